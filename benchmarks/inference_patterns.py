"""Measure whether patterns make sparse inference faster at the same rate: `python -m benchmarks.inference_patterns`.

Networks with random weights are pruned in one step, 15 of 16 weights in each layer, by each pattern, and converted with
`feather_param.to_sparse_inference`. The networks take turns, on one thread.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tqdm import tqdm

import feather_param
from benchmarks import timing
from benchmarks.inference_networks import Case, pruned
from feather_param import patterns

RATE = 15 / 16
PATTERNS = {
    "elements": None,
    "blocks(4, 1)": patterns.blocks(4, 1),
    "blocks(1, 4)": patterns.blocks(1, 4),
    "n_m(1, 16)": patterns.n_m(1, 16),
}
CASES = [("resnet50", 1), ("mobilenet_v2", 1), ("mlp", 1), ("mlp", 32), ("bert", 1)]


def fits(layer: Any) -> bool:
    """Return whether all patterns fit a layer."""
    return layer.weight.shape[1] % 16 == 0 and len(layer.weight) % 4 == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    for network, batch in tqdm(CASES, unit="case"):
        calls = {}
        for name, pattern in PATTERNS.items():
            model, x = pruned(Case(network, RATE, batch), pattern, fits)
            fast, _ = feather_param.to_sparse_inference(model, x)
            calls[name] = lambda fast=fast, x=x: fast(x)
        with torch.inference_mode():
            seconds = timing.rounds(calls, arguments.rounds, warmup=2)
        figures[f"{network}, batch {batch}"] = {
            "seconds": timing.medians(seconds),
            "times of elements": {name: timing.ratio(seconds, "elements", name) for name in PATTERNS},
        }
        timing.write("inference_patterns", figures, threads=1)
    rows = [
        [name, f"{1e3 * row['seconds']['elements']:.2f}", *(f"{row['times of elements'][p]:.2f}" for p in PATTERNS)]
        for name, row in figures.items()
    ]
    print(timing.show(["network", "elements, ms", *(f"{name}: faster by" for name in PATTERNS)], rows))


if __name__ == "__main__":
    main()

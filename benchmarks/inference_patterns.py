"""Measure whether patterns make sparse inference faster at the same rate: `python -m benchmarks.inference_patterns`.

Networks with random weights are pruned in one step, 15 of 16 weights in each layer, by each pattern, and converted with
`feather_param.to_sparse_inference`. The networks take turns, on one thread.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import feather_param
from benchmarks import timing
from benchmarks.inference_networks import NETWORKS
from feather_param import allocations, patterns
from feather_param.inference import recalibrate_batchnorm

RATE = 15 / 16
PATTERNS = {
    "elements": None,
    "blocks(4, 1)": patterns.blocks(4, 1),
    "blocks(1, 4)": patterns.blocks(1, 4),
    "n_m(1, 16)": patterns.n_m(1, 16),
}
CASES = [("resnet50", 1), ("mobilenet_v2", 1), ("mlp", 1), ("mlp", 32), ("bert", 1)]


def pruned(network: str, pattern: Any, batch: int) -> tuple[nn.Module, Tensor]:
    """Return a network whose layers have the same rate and pattern, and an input. Layers that do not fit stay dense."""
    build, inputs = NETWORKS[network]
    torch.manual_seed(0)
    model = build().eval()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    odd = [f"{name}.weight" for name, layer in layers.items() if layer.weight.shape[1] % 16 or len(layer.weight) % 4]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing survives|fewer survivors")
        settings: dict[str, Any] = {"final_rate": RATE, "total_steps": 1, "allocation": allocations.uniform}
        feather_param.sparsify(model, pattern=pattern, exclude=odd or None, **settings).step()
        feather_param.desparsify(model)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        recalibrate_batchnorm(model, [inputs(4)])  # otherwise the activations vanish
    return model, inputs(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    for network, batch in tqdm(CASES, unit="case"):
        calls = {}
        for name, pattern in PATTERNS.items():
            model, x = pruned(network, pattern, batch)
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

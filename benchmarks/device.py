"""Time of threshold and operator, against reading the weights once: `python -m benchmarks.device --device cuda`.

The bound is a sum over one tensor of all the weights. ``step()`` and the forward pass of the operator are timed over 53
tensors. On a GPU, the forward pass is also timed in a CUDA graph. The operator is also timed over one tensor, for
several exponents.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import timing
from benchmarks.threshold import controlled, layers
from feather_param.parametrizations import feather_threshold

POWERS = (0.5, 0.7, 1.0, 2.0, 3.0, math.inf)


def measure(weights: int, device: torch.device, n: int) -> dict[str, dict[str, float]]:
    """Return times and ratios to the bound."""
    model = layers(weights).to(device)
    joined = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    controller = controlled(model)
    dense = [parameter.detach() for parameter in model.parameters()]
    threshold = controller.threshold

    def forward() -> None:
        for weight in dense:
            feather_threshold(weight, threshold)

    variants: dict[str, Callable[[], object]] = {
        "reading the weights once": joined.sum,
        "Controller.step()": controller.step,
        "operator, forward": forward,
    }
    for p in POWERS:
        variants[f"operator, one tensor, p = {p:g}"] = partial(feather_threshold, joined, threshold, 1.0, p)
    if device.type == "cuda":
        variants["operator, forward, in a CUDA graph"] = _captured(forward)
    seconds = timing.rounds(variants, n, warmup=3)
    median = timing.medians(seconds)
    return {
        name: {"seconds": median[name], "over reading once": timing.ratio(seconds, name, "reading the weights once")}
        for name in variants
    }


def _captured(work: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--weights", type=int, nargs="+", default=[25_000_000, 1_000_000_000])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    rows = []
    path = None
    for weights in arguments.weights:
        figures[str(weights)] = measure(weights, torch.device(arguments.device), arguments.rounds)
        for name, row in figures[str(weights)].items():
            numbers = [f"{1e3 * row['seconds']:.2f}", f"{row['over reading once']:.2f}"]
            rows.append([f"{weights / 1e6:.0f} M", name, *numbers])
        path = timing.write(f"device_{arguments.device}", figures)
    print(timing.show(["weights", "what", "ms", "over reading once"], rows))
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()

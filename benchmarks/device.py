"""Time of threshold and operator, against reading the weights once: `python -m benchmarks.device --device cuda`.

The bound is a sum over one tensor of all the weights. ``step()`` is timed over 53 tensors, and the forward pass of the
operator over 53 tensors and one, for several exponents. On a GPU, both are also timed in CUDA graphs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.threshold import controlled, layers
from feather_param.parametrizations import feather_threshold

POWERS = (0.5, 0.7, 1.0, 2.0, 3.0, math.inf)
_WARM_UP = 3


Rows = dict[str, dict[str, float]]


def threshold(weights: int, device: torch.device, n: int, graphs: bool) -> Rows:
    """Return the time of an update of the threshold, eager and in a CUDA graph, and its ratio to the bound."""
    model = layers(weights).to(device)
    step = controlled(model).step
    variants: dict[str, Callable[[], object]] = {"Controller.step()": step}
    if graphs:
        variants["Controller.step(), captured"] = captured(step, device)
    return _timed(_joined(model), variants, n)


def operator(weights: int, device: torch.device, n: int, graphs: bool, powers: Sequence[float]) -> Rows:
    """Return the times of the forward pass of the operator, eager and in CUDA graphs, and their ratios to the bound."""
    model = layers(weights).to(device)
    limit = controlled(model).threshold
    joined = _joined(model)
    dense = [parameter.detach() for parameter in model.parameters()]
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None  # nobody reads the results of the graphs

    def forward(tensors: Sequence[Tensor], p: float) -> None:
        for tensor in tensors:
            feather_threshold(tensor, limit, 1.0, p)

    variants: dict[str, Callable[[], object]] = {}
    for p in powers:
        for name, tensors in (("53 tensors", dense), ("one tensor", [joined])):
            work = partial(forward, tensors, p)
            variants[f"operator, {name}, p = {p:g}"] = work
            if graphs:
                variants[f"operator, {name}, p = {p:g}, captured"] = captured(work, device, pool=pool)
    return _timed(joined, variants, n)


def _joined(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def _timed(joined: Tensor, variants: dict[str, Callable[[], object]], n: int) -> Rows:
    bound = "reading the weights once"
    seconds = timing.rounds({bound: joined.sum, **variants}, n, warmup=3)
    median = timing.medians(seconds)
    return {
        name: {"seconds": median[name], "over reading once": timing.ratio(seconds, name, bound)} for name in seconds
    }


def captured(work: Callable[[], object], device: torch.device, pool: Any = None) -> Callable[[], object]:
    """Return a function that replays some work from a CUDA graph. On a CPU, return the work itself.

    Args:
        work: the work. It is called a few times first, to choose algorithms and to compile kernels.
        device: its device.
        pool: a memory pool that several graphs have in common, if nobody reads their results.
    """
    if device.type != "cuda":
        return work
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
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
        device, graphs = torch.device(arguments.device), arguments.device != "cpu"
        figures[str(weights)] = {
            **threshold(weights, device, arguments.rounds, graphs),
            **operator(weights, device, arguments.rounds, graphs, POWERS),
        }
        for name, row in figures[str(weights)].items():
            numbers = [f"{1e3 * row['seconds']:.2f}", f"{row['over reading once']:.2f}"]
            rows.append([f"{weights / 1e6:.0f} M", name, *numbers])
        path = timing.write(f"device_{arguments.device}", figures)
    print(timing.show(["weights", "what", "ms", "over reading once"], rows))
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()

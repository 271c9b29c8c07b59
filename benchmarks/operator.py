"""The thresholding operator, forward and backward: `python -m benchmarks.operator`.

Compares `feather_threshold` at 25 million weights and a rate of 95 % with three others: the equation as written, which
saves a float mask for the backward pass as in the paper's code; the product with a mask, as in `torch.nn.utils.prune`;
and a ``clone()`` of the weights, which is the bound. The weights are one tensor, or 53 tensors. The results of one
tensor take new memory from the system each time. The results of 53 tensors reuse memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import timing
from benchmarks.papers_code import RATE, PapersOperator
from feather_param.ops.kth import kth_magnitude
from feather_param.parametrizations import feather_threshold


def layers(weights: int, tensors: int, dtype: torch.dtype) -> list[Tensor]:
    """Return weights of unequal sizes with this total number of elements."""
    generator = torch.Generator().manual_seed(0)
    parts = [1 + i % 7 for i in range(tensors)]
    sizes = [weights * part // sum(parts) for part in parts]
    return [(0.02 * torch.randn(size, generator=generator)).to(dtype).requires_grad_() for size in sizes]


def forward(function: Callable[[Tensor], Tensor], weights: list[Tensor]) -> None:
    """Call a function on each of the weights."""
    for weight in weights:
        function(weight)


def both(function: Callable[[Tensor], Tensor], weights: list[Tensor], grads: list[Tensor]) -> None:
    """Call a function on each of the weights, and run its backward pass."""
    for weight, grad in zip(weights, grads, strict=True):
        function(weight).backward(grad)
        weight.grad = None


def measure(weights: list[Tensor], n: int, compiled: bool) -> dict[str, dict[str, dict[str, float]]]:
    """Return the times and ratios by direction and operator."""
    grads = [torch.randn_like(weight) for weight in weights]
    threshold = kth_magnitude({str(i): w for i, w in enumerate(weights)}, int(RATE * sum(w.numel() for w in weights)))
    masks = {id(weight): (weight.detach().abs() > threshold).to(weight.dtype) for weight in weights}
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "clone()": torch.clone,
        "feather_threshold, theta = 1": lambda weight: feather_threshold(weight, threshold, 1.0),
        "feather_threshold, theta = 0.5": lambda weight: feather_threshold(weight, threshold, 0.5),
        "equation as written": lambda weight: PapersOperator.apply(weight, threshold, 1.0),
        "mask of torch.nn.utils.prune": lambda weight: weight * masks[id(weight)],
    }
    if compiled:
        operator = torch.compile(feather_threshold, dynamic=True)
        functions["feather_threshold, compiled"] = lambda weight: operator(weight, threshold, 1.0)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for direction, run in (
        ("forward", partial(forward, weights=weights)),
        ("forward + backward", partial(both, weights=weights, grads=grads)),
    ):
        seconds = timing.rounds({name: partial(run, function) for name, function in functions.items()}, n)
        median = timing.medians(seconds)
        results[direction] = {
            name: {
                "seconds": median[name],
                "over clone()": timing.ratio(seconds, name, "clone()"),
                "faster than the equation as written": timing.ratio(seconds, "equation as written", name),
            }
            for name in functions
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, default=25_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="also measure the operator under torch.compile")
    parser.add_argument("--suffix", default="", help="suffix of the name of the results file")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    rows = []
    for dtype, tensors in tqdm([(torch.float32, 1), (torch.float32, 53), (torch.bfloat16, 53)], desc="cases"):
        case = f"{str(dtype).removeprefix('torch.')}, {tensors} tensor{'s' if tensors > 1 else ''}"
        figures[case] = measure(layers(arguments.weights, tensors, dtype), arguments.rounds, arguments.compile)
        for direction, results in figures[case].items():
            for name, row in results.items():
                numbers = [f"{1e3 * row['seconds']:.0f}", *(f"{value:.2f}" for value in list(row.values())[1:])]
                rows.append([case, direction, name, *numbers])
    header = ["weights", "direction", "operator", "ms", "over clone()", "faster than the equation as written"]
    print(timing.show(header, rows))
    print(f"\nwritten to {timing.write('operator' + arguments.suffix, figures)}")


if __name__ == "__main__":
    main()

"""Exact order statistics of the magnitudes of many tensors together.

A magnitude is ``|w|`` as float32, the precision in which the operator compares (a float64 weight is rounded).
Non-negative floats order like their bit patterns read as integers, so magnitudes are ranked as int32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PruneCount", "count_pruned", "kth_magnitude"]

_INFINITY = 0x7F800000  # the bits of +inf; only the NaNs lie above


def kth_magnitude(weights: Mapping[str, Tensor], k: int) -> Tensor:
    """Return the exact k-th smallest magnitude of all the weights together.

    Args:
        weights: tensors by name, of any shape, floating dtype, memory format and device.
        k: 1 for the smallest; 0 stands below them all and gives 0.

    Returns:
        A 0-dim float32 tensor on the device of the first weight.

    Raises:
        ValueError: a weight holds NaN or infinity; the message names it.

    Example:
        >>> kth_magnitude({"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([[-2.0]])}, 2)
        tensor(2.)
    """
    total = sum(weight.numel() for weight in weights.values())
    if not 0 <= k <= total:
        raise ValueError(f"expected k between 0 and the number of weights, {total}, got {k}")
    device = next(iter(weights.values())).device
    scratch = torch.empty(total, dtype=torch.float32, device=device)
    start = 0
    for weight in weights.values():
        end = start + weight.numel()
        scratch[start:end].view(weight.shape).copy_(weight.detach())
        start = end
    scratch.abs_()
    if device.type == "cpu":
        return _kth_on_cpu(weights, scratch, k)
    return scratch.kthvalue(k).values if k else torch.zeros((), device=device)


def _kth_on_cpu(weights: Mapping[str, Tensor], scratch: Tensor, k: int) -> Tensor:
    bits = scratch.view(torch.int32).numpy()
    if k:
        bits.partition(k - 1)  # vectorised quickselect: everything from k - 1 on is at least the k-th
    if bits[max(k - 1, 0) :].max(initial=0) >= _INFINITY:
        _raise_non_finite(weights)
    return scratch[k - 1].clone() if k else torch.zeros(())


def _raise_non_finite(weights: Mapping[str, Tensor]) -> None:
    names = [name for name, weight in weights.items() if not weight.detach().float().isfinite().all()]
    raise ValueError(
        f"expected finite weights, got NaN or infinity in {', '.join(names)}; the training has diverged: "
        "go back to the last checkpoint and lower the learning rate, or clip the gradients"
    )


@dataclass(frozen=True)
class PruneCount:
    """How many weights of one tensor are pruned: its zeros in all, and how many of them lie at the threshold."""

    zeros: int
    ties: int


def count_pruned(weights: Mapping[str, Tensor], threshold: Tensor, k: int) -> dict[str, PruneCount]:
    """Count what pruning the k smallest magnitudes takes from each tensor.

    All magnitudes below the threshold go; of those equal to it the first ones, in the order of the mapping and
    of each tensor's elements, until k are gone. With a zero threshold every zero counts, even beyond k.

    Args:
        weights: tensors by name.
        threshold: the k-th smallest magnitude, as `kth_magnitude` gives it.
        k: number of weights to prune.

    Example:
        >>> count_pruned({"a": torch.ones(2), "b": torch.ones(2)}, torch.tensor(1.0), 3)
        {'a': PruneCount(zeros=2, ties=2), 'b': PruneCount(zeros=1, ties=1)}
    """
    below: dict[str, int] = {}
    equal: dict[str, int] = {}
    for name, weight in weights.items():
        magnitude = weight.detach().float().abs()
        t = threshold.to(magnitude.device)
        below[name] = int((magnitude < t).sum())
        equal[name] = int((magnitude == t).sum())
    quota = sum(equal.values()) if threshold == 0 else k - sum(below.values())
    counts: dict[str, PruneCount] = {}
    for name in weights:
        ties = max(0, min(equal[name], quota))
        quota -= ties
        counts[name] = PruneCount(below[name] + ties, ties)
    return counts

"""Magnitudes of units, computed such that all callers get the same bits.

Note [Magnitudes of units]

Masks, reports and forward passes compare the magnitudes of units with a threshold, which is one of these magnitudes. If
two of them computed different bits, a unit could be pruned in one and kept in the other. So all of them call the
functions here. These functions give the same bits in eager code, in compiled code, and on any device:

* `smallest` only compares.
* `root_mean_square` works elementwise, since the order of the additions inside a reduction varies. It works in float64,
  where the squares of numbers of 32 bits or less are exact. A compiler for GPUs may fuse a square into an addition, and
  omit the rounding of the square. (Float64 weights in compiled code on a GPU are not safe from that.) Its root is the
  inverse of `rsqrt`: on a CPU, torch computes `sqrt` with MKL, whose last bit differs from that of compiled code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def root_mean_square(values: Tensor) -> Tensor:
    """Return the root of the mean of the squares over the first dimension; float64 for float64, else float32.

    The result is 0 only if all the values are. The sum adds the second half of the rows to the first half, until one
    row is left.

    Example:
        >>> root_mean_square(torch.tensor([[1.0, 3.0], [-1.0, 4.0]]))
        tensor([1.0000, 3.5355])
    """
    scale = _scale(values) if values.dtype == torch.float64 else 1.0
    sums, n = (values.double() * scale).square(), len(values)
    while len(sums) > 1:
        half = len(sums) // 2
        rest = sums[2 * half :]
        sums = sums[:half] + sums[half : 2 * half]
        sums = torch.cat([sums, rest]) if len(rest) else sums
    root = 1.0 / (sums[0] * (1.0 / n)).rsqrt()  # 1 / infinity = 0 is the root of 0
    return root / scale if values.dtype == torch.float64 else root.float()


def _scale(values: Tensor) -> Tensor:
    """Return powers of two, such that the squares of the scaled float64 values neither overflow nor underflow."""
    largest = values.abs().amax(0)
    scale = torch.ones_like(largest).masked_fill(largest < 2.0**-400, 2.0**600)
    return scale.masked_fill(largest > 2.0**400, 2.0**-600)


def smallest(values: Sequence[Tensor], count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the smallest of some tensors, element by element, in ascending order, and the other values.

    It takes minima and maxima of two tensors, 2 ``count`` times the number of tensors. For groups of 4 this takes a
    twentieth of the time of a sort.

    Example:
        >>> smallest([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 5.0]), torch.tensor([1.0, 4.0])], 2)
        ([tensor([1., 1.]), tensor([2., 4.])], [tensor([3., 5.])])
    """
    others, found = list(values), []
    for _ in range(count):
        least, *before = others
        others = []
        for other in before:
            others.append(torch.maximum(least, other))
            least = torch.minimum(least, other)
        found.append(least)
    return found, others

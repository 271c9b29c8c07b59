"""Weights with exact zeros, computed from dense weights and their thresholds or masks. No model is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from feather_param.allocations import global_magnitude
from feather_param.ops.dtypes import rounded_down, smallest_kept
from feather_param.ops.groups import Group
from feather_param.ops.masking import all_kept
from feather_param.patterns import Pattern

Allocate = Callable[[Mapping[str, Tensor], int], list[Group]]
"""Maps (weights by name, number of zeros) to groups."""


def exact_value(weight: Tensor, mask: Tensor, threshold: Tensor, pattern: Pattern, p: float) -> Tensor:
    """Return the value of the operator, with zeros where the mask is False, and only there.

    Args:
        weight: the dense weight.
        mask: bool, of the same shape; True where an element is kept.
        threshold: the threshold of the weight, a 0-dim tensor of any device.
        pattern: the pattern of the training.
        p: the exponent of the operator.
    """
    mask = mask.to(weight.device)
    with torch.no_grad():
        value = pattern.shrink(weight, rounded_down(threshold, weight.dtype).to(weight.device), p=p)
        # A kept element may be zero here, by a tie or an underflow. It becomes a negligible number.
        negligible = torch.full_like(weight, smallest_kept(weight.dtype)).copysign_(weight)
        return torch.where(mask, torch.where(value == 0, negligible, value), 0.0)


def masks_of_frozen(
    weights: Mapping[str, Tensor], zeros: int, pattern: Pattern, allocate: Allocate
) -> dict[str, Tensor]:
    """Return masks that prune a number of elements, those of the smallest magnitudes.

    Elements that are zero come first. So the masks of a frozen model are found again from its weights.
    """
    if not zeros:
        return all_kept(weights)
    groups = pattern.allocate(global_magnitude, weights, zeros, {})
    # If all pruned elements are zero, the allocation could divide them otherwise: its numbers may follow from the
    # dense weights.
    if groups[0].threshold != 0:
        groups = allocate(weights, zeros)
    return pattern.masks(weights, groups)

"""Groups of weights that are ranked together: their thresholds, and the elements that these prune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from feather_param.ops.count import PruneCount, count_pruned
from feather_param.ops.distributed import held_here, whole
from feather_param.ops.kth import kth_magnitudes


@dataclass(frozen=True)
class Group:
    """Weights that are ranked together.

    Attributes:
        names: the names of the weights.
        zeros: the number of zeros in all these weights together.
        threshold: the largest magnitude that is pruned; a 0-dim tensor, float64 if one of the weights is, else float32.
    """

    names: tuple[str, ...]
    zeros: int
    threshold: Tensor


def group_each(weights: Mapping[str, Tensor], zeros: Mapping[str, int]) -> list[Group]:
    """Return a group for each weight, given the number of zeros of each.

    The thresholds of all weights are computed together. If the weights are sharded, all processes must call this.

    Raises:
        ValueError: a weight holds NaN or infinity (on other devices than a CPU its threshold is NaN instead).

    Example:
        >>> group_each({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}, {"a": 1, "b": 0})
        [Group(names=('a',), zeros=1, threshold=tensor(1.)), Group(names=('b',), zeros=0, threshold=tensor(0.))]
    """
    parts, add_up = held_here(weights)
    thresholds = kth_magnitudes(parts, zeros, add_up)
    return [Group((name,), zeros[name], thresholds[name]) for name in weights]


def count_zeros(weights: Mapping[str, Tensor], groups: Sequence[Group]) -> dict[str, PruneCount]:
    """Count the zeros that each weight gets, in the order of the mapping; see `masks`.

    If the weights are sharded, all processes must call this.
    """
    parts, add_up = held_here(weights)
    all_zeros = _zeros_exceed(weights, groups)
    counts: dict[str, PruneCount] = {}
    for group in groups:
        if group.names:
            own = {name: parts[name] for name in group.names}
            counts.update(count_pruned(own, group.threshold, group.zeros, add_up, all_zeros))
    return {name: counts[name] for name in weights}


def masks(weights: Mapping[str, Tensor], groups: Sequence[Group]) -> dict[str, Tensor]:
    """Return the mask of each weight: bool tensors, True for elements that are kept.

    Magnitudes above the threshold are kept, those below are pruned. Of those that equal the threshold, the first ones
    are pruned until the group has its zeros, in the order of the weights and of their elements.

    If more elements are zero than all groups have zeros together, no element that is zero is kept. Otherwise a group
    may have fewer zeros than elements that are zero. Some of these are kept then, like other ties, so that the total
    is exact.

    The mask of a sharded weight is a whole tensor. All processes must call this if weights are sharded.

    Example:
        >>> weights = {"a": torch.tensor([1.0, 1.0, 3.0])}
        >>> masks(weights, [Group(("a",), 1, torch.tensor(1.0))])
        {'a': tensor([False,  True,  True])}
    """
    found: dict[str, Tensor] = {}
    all_zeros = _zeros_exceed(weights, groups)
    for group in groups:
        kept_ties = -group.zeros  # number of elements that equal the threshold and are kept
        for name in group.names:
            weight = whole(weights[name].detach())
            threshold = group.threshold.to(weight.device)
            if weight.dtype == threshold.dtype:  # needs less memory: no tensor of magnitudes
                found[name] = (weight > threshold).logical_or_(weight < -threshold)
            else:
                found[name] = weight.abs().to(threshold.dtype) > threshold
            kept_ties += weight.numel() - int(torch.count_nonzero(found[name]))
        if kept_ties <= 0 or (all_zeros and group.threshold == 0):
            continue
        for name in reversed(group.names):
            magnitude = whole(weights[name].detach()).abs().to(group.threshold.dtype)
            tied = magnitude == group.threshold.to(magnitude.device)
            count = int(torch.count_nonzero(tied))
            if count:  # `cumsum` counts in the order of the elements, for any memory format
                rank = tied.flatten().cumsum(0).view(tied.shape)
                found[name] |= tied & (rank > count - kept_ties)
                kept_ties -= min(count, kept_ties)
    return {name: found[name] for name in weights}


def require_total(groups: Sequence[Group], zeros: int, allocation: str) -> None:
    """Refuse groups of an allocation whose zeros do not add up.

    Raises:
        ValueError: they have another number of zeros together.
    """
    if (total := sum(group.zeros for group in groups)) != zeros:
        raise ValueError(
            f"expected the allocation {allocation} to give {zeros} zeros to all weights together, got {total}"
        )


def _zeros_exceed(weights: Mapping[str, Tensor], groups: Sequence[Group]) -> bool:
    """Return whether more elements are zero than the groups have zeros together. False if it does not matter."""
    used = [group for group in groups if group.names]
    if not any(bool(group.threshold == 0) for group in used):
        return False
    if len(used) == 1:
        return True
    parts, add_up = held_here(weights)
    natural = sum(torch.count_nonzero(part.detach() == 0).cpu() for part in parts.values())
    assert isinstance(natural, Tensor)
    if add_up:
        natural = add_up(natural.to(next(iter(parts.values())).device))
    return int(natural) > sum(group.zeros for group in used)

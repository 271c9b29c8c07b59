"""Allocations: how many zeros each weight gets, and which of its elements these are.

An allocation divides the weights into groups. The weights of a group are ranked together and lose their smallest
magnitudes, so each group has one threshold. By global magnitude all weights form one group, but for those at their
guard, the most zeros that a weight may get.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from feather_param.ops.count import PruneCount, count_pruned
from feather_param.ops.distributed import held_here, whole
from feather_param.ops.kth import kth_magnitude

__all__ = ["Allocation", "Budget", "Group", "count_zeros", "global_magnitude", "masks"]


@dataclass(frozen=True)
class Group:
    """Weights that are ranked together."""

    names: tuple[str, ...]
    zeros: int  # of them all together
    threshold: Tensor  # the largest magnitude that is pruned: 0-dim, float64 if one of the weights is, else float32


Allocation = Callable[[Mapping[str, Tensor], int, Mapping[str, int]], list[Group]]
"""Divides zeros among weights: from (weights by name, number of zeros, guards by name) to groups.

A guard is the most zeros of a weight; those without a name have none.
The weights may be sharded over processes; then all processes call it.
"""


def global_magnitude(weights: Mapping[str, Tensor], zeros: int, guards: Mapping[str, int]) -> list[Group]:
    """Prune the smallest magnitudes of all weights together, but from no weight more than its guard.

    This is what the greedy rule gives: go through all elements by magnitude, equal ones in the order of the weights
    and of their elements, and prune each one whose weight is not at its guard yet. Elements that are zero anyway are
    pruned whatever the guard. The weights below their guards form the first group, each other one its own.

    Raises:
        ValueError: a weight holds NaN or infinity.

    Source: the global threshold of Feather (https://arxiv.org/abs/2310.02448); the guards are ours.

    Example:
        >>> weights = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([4.0, 5.0, 6.0])}
        >>> for group in global_magnitude(weights, 4, {"a": 2}):
        ...     print(group.names, group.zeros, group.threshold)
        ('b',) 2 tensor(5.)
        ('a',) 2 tensor(2.)
    """
    parts, add_up = held_here(weights)
    guarded: list[Group] = []
    names = tuple(weights)
    while True:
        free = {name: parts[name] for name in names}
        threshold = kth_magnitude(free, zeros, add_up)
        over: dict[str, int] = {}
        if guards and not threshold.is_meta and threshold != 0:  # at 0, only elements that are zero anyway are pruned
            counts = count_pruned(free, threshold, zeros, add_up)
            above = [name for name in names if counts[name].zeros > guards.get(name, counts[name].zeros)]
            natural = count_pruned({name: parts[name] for name in above}, 0 * threshold, 0, add_up)
            limits = {name: max(guards[name], natural[name].zeros) for name in above}
            over = {name: limit for name, limit in limits.items() if counts[name].zeros > limit}
        for name, limit in over.items():
            zeros -= limit
            guarded.append(Group((name,), limit, kth_magnitude({name: parts[name]}, limit, add_up)))
        names = tuple(name for name in names if name not in over)
        if not over or not names:
            return [Group(names, zeros, threshold), *guarded]


def count_zeros(weights: Mapping[str, Tensor], groups: Sequence[Group]) -> dict[str, PruneCount]:
    """Count the zeros that each weight gets, in the order of the mapping; all processes call this."""
    parts, add_up = held_here(weights)
    counts: dict[str, PruneCount] = {}
    for group in groups:
        if group.names:
            own = {name: parts[name] for name in group.names}
            counts.update(count_pruned(own, group.threshold, group.zeros, add_up))
    return {name: counts[name] for name in weights}


def masks(weights: Mapping[str, Tensor], groups: Sequence[Group]) -> dict[str, Tensor]:
    """Return which elements of each weight stay: bool tensors, whole ones also where the weights are sharded.

    What lies above the threshold stays. Of the elements that equal it, the first ones of the group are pruned, in the
    order of the weights and of their elements, until the group has its zeros. An element that is zero never stays.

    Example:
        >>> weights = {"a": torch.tensor([1.0, 1.0, 3.0])}
        >>> masks(weights, [Group(("a",), 1, torch.tensor(1.0))])
        {'a': tensor([False,  True,  True])}
    """
    found: dict[str, Tensor] = {}
    for group in groups:
        spare = -group.zeros  # of the elements that equal the threshold, those that stay
        for name in group.names:
            weight = whole(weights[name].detach())
            threshold = group.threshold.to(weight.device)
            if weight.dtype == threshold.dtype:  # by no more memory than the mask's
                found[name] = (weight > threshold).logical_or_(weight < -threshold)
            else:
                found[name] = weight.abs().to(threshold.dtype) > threshold
            spare += weight.numel() - int(torch.count_nonzero(found[name]))
        if spare <= 0 or group.threshold == 0:
            continue
        for name in reversed(group.names):
            magnitude = whole(weights[name].detach()).abs().to(group.threshold.dtype)
            tied = magnitude == group.threshold.to(magnitude.device)
            count = int(torch.count_nonzero(tied))
            if count:  # `cumsum` counts in the order of the elements, whatever the memory format
                rank = tied.flatten().cumsum(0).view(tied.shape)
                found[name] |= tied & (rank > count - spare)
                spare -= min(count, spare)
    return {name: found[name] for name in weights}


@dataclass(frozen=True)
class Budget:
    """How many zeros a set of tensors may get: fewer than all, and in none more than its guard.

    Example:
        >>> budget = Budget({"a": 100, "b": 8}, max_rate=0.99, min_nonzero=5)
        >>> budget.guards, budget.most, budget.zeros(0.9)
        ({'a': 95, 'b': 3}, 98, 97)
    """

    sizes: Mapping[str, int]  # number of elements, by name
    max_rate: float = 1.0  # largest fraction of zeros in each
    min_nonzero: int = 0  # least number of elements that survive in each

    @property
    def total(self) -> int:
        """Number of elements of all the tensors."""
        return sum(self.sizes.values())

    @cached_property
    def guards(self) -> dict[str, int]:
        """The most zeros of each tensor where that is less than its size."""
        guards: dict[str, int] = {}
        for name, size in self.sizes.items():
            by_rate = math.floor(self.max_rate * size + 1e-12 * size)  # 0.29 * 100 is 28.99...
            most = max(0, min(by_rate, size - self.min_nonzero))
            if most < size:
                guards[name] = most
        return guards

    @property
    def most(self) -> int:
        """The most zeros of all the tensors together."""
        return min(self.total - 1, sum(self.guards.get(name, size) for name, size in self.sizes.items()))

    def zeros(self, rate: float) -> int:
        """Return the number of zeros at a rate."""
        return round(rate * self.total)

    def require(self, final_rate: float) -> None:
        """Refuse a rate that cannot be reached."""
        if self.zeros(final_rate) <= self.most:
            return
        if not self.guards:
            raise ValueError(
                f"expected a final_rate that leaves a weight, got {final_rate} of {self.total} weights in all"
            )
        raise ValueError(
            f"expected a final_rate of at most {math.floor(1e6 * self.most / self.total) / 1e6}, which is what "
            f"max_rate_per_layer and min_nonzero_per_layer leave ({self.most} of {self.total} weights), "
            f"got {final_rate}; loosen them, or prune more layers"
        )

"""Allocations: how many zeros each weight gets.

An allocation is a function from the weights and a number of zeros to groups of weights. The weights of a group are
ranked together, and the smallest magnitudes of the group are pruned. `global_magnitude` puts all weights into one
group. An allocation that chooses the zeros of each weight makes one group for each weight.

To add an allocation, write one function:

>>> from itertools import accumulate
>>> def uniform(weights, zeros, guards):  # an example that ignores the guards
...     parts, add_up = held_here(weights)
...     ends = [*accumulate(weight.numel() for weight in weights.values())]
...     zeros_up_to = [0, *(round(zeros * end / ends[-1]) for end in ends)]
...     groups = []
...     for name, first, last in zip(weights, zeros_up_to, zeros_up_to[1:]):
...         threshold = kth_magnitude({name: parts[name]}, last - first, add_up)
...         groups.append(Group((name,), last - first, threshold))
...     return groups
>>> uniform({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}, 2, {})
[Group(names=('a',), zeros=1, threshold=tensor(1.)), Group(names=('b',), zeros=1, threshold=tensor(3.))]

Its arguments:

* ``weights``: the dense weights by name. They may be on the meta device, or sharded over processes.
* ``zeros``: the number of zeros in all weights together, ``round(rate * N)``. The guards always leave room for it.
* ``guards``: the most zeros of a weight, by name. Weights without a guard are left out.

It must return a list of `Group`:

* Each weight is in exactly one group.
* The zeros of the groups add up to ``zeros``.
* The threshold of a group is the ``zeros``-th smallest magnitude of its weights, or 0 if it gets no zeros.
* No weight gets more zeros than its guard, except for elements that are zero anyway.

`kth_magnitude` computes such a threshold. It finds NaN and infinity, and works on the meta device. For sharded weights,
`held_here` returns the two arguments that `kth_magnitude` needs: the elements that this process counts, and the sum
over the processes.

`sparsify` has no argument for it yet; `core.config.Config` takes it as ``allocation``.

The library calls the allocation at each step and when it refreshes the thresholds. `masks` prunes exactly the zeros of
each group. If several magnitudes equal the threshold, the first ones are pruned. More elements are zero only if they
were zero before. `count_zeros` counts the same for reports. Both work with sharded weights. `Budget` computes the
guards, and refuses a rate for which they leave no room.
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
    """Weights that are ranked together.

    Attributes:
        names: the names of the weights.
        zeros: the number of zeros in all these weights together.
        threshold: the largest magnitude that is pruned; a 0-dim tensor, float64 if one of the weights is, else float32.
    """

    names: tuple[str, ...]
    zeros: int
    threshold: Tensor


Allocation = Callable[[Mapping[str, Tensor], int, Mapping[str, int]], list[Group]]
"""Divides zeros among weights: maps (weights by name, number of zeros, guards by name) to groups.

If the weights are sharded, all processes call it.
"""


def global_magnitude(weights: Mapping[str, Tensor], zeros: int, guards: Mapping[str, int]) -> list[Group]:
    """Prune the smallest magnitudes of all weights together, but in no weight more than its guard.

    The result equals that of a greedy rule. The rule visits all elements by magnitude, ties in the order of the weights
    and of their elements. It prunes an element unless its weight has reached its guard. Elements that are zero anyway
    are pruned in any case.

    The first group has the weights that did not reach their guards; it may be empty. Each other weight has a group of
    its own.

    Raises:
        ValueError: a weight holds NaN or infinity (on other devices than a CPU the threshold is NaN instead).

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
        if guards and not threshold.is_meta and threshold != 0:  # at 0, all pruned elements are zero anyway
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
    """Count the zeros that each weight gets, in the order of the mapping.

    If the weights are sharded, all processes must call this.
    """
    parts, add_up = held_here(weights)
    counts: dict[str, PruneCount] = {}
    for group in groups:
        if group.names:
            own = {name: parts[name] for name in group.names}
            counts.update(count_pruned(own, group.threshold, group.zeros, add_up))
    return {name: counts[name] for name in weights}


def masks(weights: Mapping[str, Tensor], groups: Sequence[Group]) -> dict[str, Tensor]:
    """Return the mask of each weight: bool tensors, True for elements that are kept.

    Magnitudes above the threshold are kept, those below are pruned. Of those that equal the threshold, the first ones
    are pruned until the group has its zeros, in the order of the weights and of their elements. An element that is zero
    is never kept.

    The mask of a sharded weight is a whole tensor. All processes must call this if weights are sharded.

    Example:
        >>> weights = {"a": torch.tensor([1.0, 1.0, 3.0])}
        >>> masks(weights, [Group(("a",), 1, torch.tensor(1.0))])
        {'a': tensor([False,  True,  True])}
    """
    found: dict[str, Tensor] = {}
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
        if kept_ties <= 0 or group.threshold == 0:
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


@dataclass(frozen=True)
class Budget:
    """The most zeros of a set of weights: in no weight more than its guard, and in all weights together
    at least one element is kept.

    Attributes:
        sizes: number of elements, by name.
        max_rate: largest fraction of zeros in each weight.
        min_nonzero: smallest number of elements that are not zero in each weight.
        unit: number of elements that are pruned together; all numbers of zeros are multiples of it.
        largest_rate: largest fraction of zeros in each weight that the pattern allows.

    Example:
        >>> budget = Budget({"a": 100, "b": 8}, max_rate=0.99, min_nonzero=5)
        >>> budget.guards, budget.most, budget.zeros(0.9)
        ({'a': 95, 'b': 3}, 98, 97)
    """

    sizes: Mapping[str, int]
    max_rate: float = 1.0
    min_nonzero: int = 0
    unit: int = 1
    largest_rate: float = 1.0

    @property
    def total(self) -> int:
        """The number of elements of all weights."""
        return sum(self.sizes.values())

    @cached_property
    def guards(self) -> dict[str, int]:
        """The most zeros of each weight, by name. Weights without a guard are left out."""
        guards: dict[str, int] = {}
        for name, size in self.sizes.items():
            rate = min(self.max_rate, self.largest_rate)
            by_rate = math.floor(rate * size + 1e-12 * size)  # 0.29 * 100 is 28.99...
            most = self._whole(max(0, min(by_rate, size - self.min_nonzero)))
            if most < size:
                guards[name] = most
        return guards

    @property
    def most(self) -> int:
        """The most zeros of all weights together."""
        most = min(self.total - 1, sum(self.guards.get(name, size) for name, size in self.sizes.items()))
        return self._whole(most)

    def zeros(self, rate: float) -> int:
        """Return the number of zeros at a rate."""
        return self._whole(round(rate * self.total))

    def _whole(self, zeros: int) -> int:
        """Return the largest number of zeros up to a number that whole units have."""
        return zeros // self.unit * self.unit

    def require(self, final_rate: float) -> None:
        """Raise a ValueError if a rate cannot be reached."""
        if self.zeros(final_rate) <= self.most:
            return
        if not self.guards:
            raise ValueError(
                f"expected a final_rate that leaves a weight, got {final_rate} of {self.total} weights in all"
            )
        limits, advice = "max_rate_per_layer and min_nonzero_per_layer", "loosen them, or prune more layers"
        if self.largest_rate < 1.0:
            others = self.max_rate < self.largest_rate or self.min_nonzero
            limits = f"the pattern, {limits}" if others else "the pattern"
            advice = advice if others else "lower it, or choose another pattern"
        raise ValueError(
            f"expected a final_rate of at most {math.floor(1e6 * self.most / self.total) / 1e6}, the limit set by "
            f"{limits} ({self.most} of {self.total} weights), got {final_rate}; {advice}"
        )

"""How many weights each tensor loses: the smallest magnitudes of all, but from no tensor more than its cap.

This is what the greedy rule gives: go through all weights by magnitude (equal ones in the order of the tensors and of
their elements) and prune each one whose tensor is not at its cap yet, until k are pruned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from feather_param.shards import held_here
from feather_param.thresholds import PruneCount, count_pruned, kth_magnitude

__all__ = ["Budget", "Share", "allocate", "count_zeros"]


@dataclass(frozen=True)
class Share:
    """Tensors that are pruned together, the `pruned` smallest magnitudes of them all, and the largest of these."""

    names: tuple[str, ...]
    pruned: int
    threshold: Tensor


def allocate(weights: Mapping[str, Tensor], k: int, caps: Mapping[str, int] | None = None) -> list[Share]:
    """Divide k zeros among tensors; first comes the share of those below their caps, then each one at its cap.

    Args:
        weights: tensors by name; they may be sharded over processes, which then all call this.
        k: number of weights to prune.
        caps: most zeros that a tensor may get, by name (unless it has more by itself); others have no cap.

    Raises:
        ValueError: a weight holds NaN or infinity.

    Example:
        >>> weights = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([4.0, 5.0, 6.0])}
        >>> for share in allocate(weights, 4, {"a": 2}):
        ...     print(share.names, share.pruned, share.threshold)
        ('b',) 2 tensor(5.)
        ('a',) 2 tensor(2.)
    """
    parts, add_up = held_here(weights)
    capped: list[Share] = []
    names = tuple(weights)
    while True:
        free = {name: parts[name] for name in names}
        threshold = kth_magnitude(free, k, add_up)
        over: dict[str, int] = {}
        if caps and not threshold.is_meta and threshold != 0:  # at 0, only weights that are zero anyway are pruned
            counts = count_pruned(free, threshold, k, add_up)
            above = [name for name in names if counts[name].zeros > caps.get(name, counts[name].zeros)]
            zeros = count_pruned({name: parts[name] for name in above}, 0 * threshold, 0, add_up)
            limits = {name: max(caps[name], zeros[name].zeros) for name in above}
            over = {name: limit for name, limit in limits.items() if counts[name].zeros > limit}
        for name, limit in over.items():
            k -= limit
            capped.append(Share((name,), limit, kth_magnitude({name: parts[name]}, limit, add_up)))
        names = tuple(name for name in names if name not in over)
        if not over or not names:
            return [Share(names, k, threshold), *capped]


def count_zeros(weights: Mapping[str, Tensor], shares: list[Share]) -> dict[str, PruneCount]:
    """Count the zeros that each tensor gets, in the order of the mapping; all processes call this."""
    parts, add_up = held_here(weights)
    counts: dict[str, PruneCount] = {}
    for share in shares:
        if share.names:
            group = {name: parts[name] for name in share.names}
            counts.update(count_pruned(group, share.threshold, share.pruned, add_up))
    return {name: counts[name] for name in weights}


@dataclass(frozen=True)
class Budget:
    """How many zeros a set of tensors may get: fewer than all, and from none more than its guards leave.

    Args:
        sizes: number of elements of each tensor, by name.
        max_rate: largest fraction of zeros of each tensor.
        min_nonzero: least number of elements of each tensor that survive.

    Example:
        >>> budget = Budget({"a": 100, "b": 8}, max_rate=0.99, min_nonzero=5)
        >>> budget.caps, budget.most, budget.zeros(0.9)
        ({'a': 95, 'b': 3}, 98, 97)
    """

    sizes: Mapping[str, int]
    max_rate: float = 1.0
    min_nonzero: int = 0

    @property
    def total(self) -> int:
        """Number of elements of all the tensors."""
        return sum(self.sizes.values())

    @cached_property
    def caps(self) -> dict[str, int]:
        """The most zeros of each tensor where that is less than its size."""
        caps: dict[str, int] = {}
        for name, size in self.sizes.items():
            by_rate = math.floor(self.max_rate * size + 1e-12 * size)  # 0.29 * 100 is 28.99...
            cap = max(0, min(by_rate, size - self.min_nonzero))
            if cap < size:
                caps[name] = cap
        return caps

    @property
    def most(self) -> int:
        """The most zeros of all the tensors together."""
        return min(self.total - 1, sum(self.caps.get(name, size) for name, size in self.sizes.items()))

    def zeros(self, rate: float) -> int:
        """Return the number of zeros at a rate."""
        return round(rate * self.total)

    def require(self, final_rate: float) -> None:
        """Refuse a rate that cannot be reached."""
        if self.zeros(final_rate) <= self.most:
            return
        if not self.caps:
            raise ValueError(
                f"expected a final_rate that leaves a weight, got {final_rate} of {self.total} weights in all"
            )
        raise ValueError(
            f"expected a final_rate of at most {math.floor(1e6 * self.most / self.total) / 1e6}, which is what "
            f"max_rate_per_layer and min_nonzero_per_layer leave ({self.most} of {self.total} weights), "
            f"got {final_rate}; loosen them, or prune more layers"
        )

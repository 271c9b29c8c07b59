"""The budget of zeros: the guard of each weight, and the largest rate that the guards allow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


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
            if self.unit > 1 and not self.zeros(final_rate):
                raise ValueError(
                    f"expected a final_rate that prunes a unit of {self.unit} elements, got {final_rate} of "
                    f"{self.total} weights; raise it, or choose a pattern with smaller units"
                )
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

"""The settings of the training, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Real
from typing import Any

import feather_param.schedules as schedules
from feather_param.allocations import Allocation, global_magnitude
from feather_param.core.budget import Budget
from feather_param.patterns import Pattern, elements
from feather_param.schedules import Schedule
from feather_param.utils.checks import fraction_hint, integer, real, takes
from feather_param.utils.text import name_of, printable

Theta = Callable[[float], float]
"""Maps the current rate to the gradient scale of pruned elements."""

# Functions cannot be saved. Two schedules, or two functions theta, are compared by their values at these points.
_PROBES = (0.0, 0.25, 0.5, 0.75, 1.0)
# The settings that older states do not hold, with the values that they had.
_BEFORE = {"allocation": "global_magnitude", "pattern": "elements"}


@dataclass(frozen=True)
class Config:
    """The settings of the training of a model, checked. `feather_param.sparsify` describes them.

    ``end_step``, ``theta`` and ``max_rate_per_layer`` may be None, and are replaced by their defaults.

    Raises:
        ValueError: a setting is out of its range.
        TypeError: a setting is of the wrong type.

    Example:
        >>> config = Config(final_rate=0.98, total_steps=100)
        >>> config.end_step, config.theta, config.rate(50)
        (50, 0.5, 0.98)
    """

    final_rate: float
    total_steps: int = 1
    start_step: int = 0
    end_step: int | None = None
    schedule: Schedule = schedules.cubic
    allocation: Allocation = global_magnitude
    pattern: Pattern = elements
    p: float = 3.0
    theta: float | Theta | None = None
    max_rate_per_layer: float | None = None
    min_nonzero_per_layer: int = 0

    def __post_init__(self) -> None:
        final_rate = real("final_rate", self.final_rate)
        if not 0.0 < final_rate < 1.0:
            hint = fraction_hint(final_rate)
            raise ValueError(f"expected final_rate, the fraction of zeros, in (0, 1), got {final_rate}{hint}")
        total = integer("total_steps", self.total_steps, 1)
        start = integer("start_step", self.start_step, 0)
        end = total // 2 if self.end_step is None else integer("end_step", self.end_step, 0)
        if not start <= end <= total:
            raise ValueError(
                "expected start_step <= end_step <= total_steps, "
                f"got {start}, {end} and {total}; end_step is total_steps // 2 unless given"
            )
        if not callable(self.schedule):
            raise TypeError(
                f"expected schedule to be a callable of progress, got {type(self.schedule).__name__}; use one of "
                "feather_param.schedules, for example schedules.linear"
            )
        self._require_allocation()
        for progress in (0.0, 0.5, 1.0):
            self._fraction(progress)
        if not isinstance(self.pattern, Pattern):
            raise TypeError(
                "expected pattern to be None or a call of a function of feather_param.patterns, for example "
                f"patterns.n_m(2, 4), got {self.pattern!r}"
            )
        p = real("p", self.p)
        if not p > 0.0:
            raise ValueError(f"expected p > 0 or math.inf, got {p}")
        theta = (0.5 if final_rate > 0.95 else 1.0) if self.theta is None else self.theta
        if callable(theta):
            for rate in (0.0, final_rate):
                self.theta_at(rate)
        elif not 0.0 <= real("theta", theta) < math.inf:
            raise ValueError(f"expected theta to be a finite number >= 0, got {theta}")
        most = 1.0 if self.max_rate_per_layer is None else real("max_rate_per_layer", self.max_rate_per_layer)
        if not 0.0 < most < 1.0 and self.max_rate_per_layer is not None:
            hint = fraction_hint(most)
            raise ValueError(f"expected max_rate_per_layer, a fraction of zeros, in (0, 1), got {most}{hint}")
        least = integer("min_nonzero_per_layer", self.min_nonzero_per_layer, 0)
        vars(self).update(  # the dataclass is frozen
            final_rate=final_rate,
            total_steps=total,
            start_step=start,
            end_step=end,
            p=p,
            theta=theta if callable(theta) else float(theta),
            max_rate_per_layer=most,
            min_nonzero_per_layer=least,
        )

    def rate(self, step: int) -> float:
        """Return the scheduled rate after a number of optimizer steps."""
        start, end = self.start_step, self.end_step
        assert end is not None
        if step < start:
            return 0.0
        return self.final_rate if step >= end else self.final_rate * self._fraction((step - start) / (end - start))

    def theta_at(self, rate: float) -> float:
        """Return the gradient scale of pruned elements at a rate. The result of a user's function is checked."""
        if not callable(self.theta):
            assert self.theta is not None
            return self.theta
        value = self.theta(rate)
        if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= float(value) < math.inf:
            raise ValueError(f"expected theta to return a finite number >= 0, got {value!r} for the rate {rate}")
        return float(value)

    def budget(self, sizes: Mapping[str, int]) -> Budget:
        """Return the budget of zeros for weights of these sizes."""
        assert self.max_rate_per_layer is not None
        pattern = self.pattern
        return Budget(sizes, self.max_rate_per_layer, self.min_nonzero_per_layer, pattern.size, pattern.largest_rate)

    @cached_property
    def saved(self) -> dict[str, Any]:
        """The settings in plain Python values, to be saved and compared with those of another run."""
        saved = {each.name: getattr(self, each.name) for each in fields(self)}
        saved["allocation"], saved["pattern"] = name_of(self.allocation), str(self.pattern)
        saved["schedule"] = [self._fraction(progress) for progress in _PROBES]
        if callable(self.theta):
            saved["theta"] = [self.theta_at(at * self.final_rate) for at in _PROBES]
        return saved

    def require_same(self, state: Mapping[str, Any]) -> None:
        """Refuse a controller's state that was saved with other settings.

        ``total_steps`` may differ, since it matters only through ``end_step``: a run may be made longer.

        Raises:
            ValueError: another setting differs.
        """
        for key, ours in self.saved.items():
            theirs = state.get(key, _BEFORE.get(key))
            if theirs == ours or key == "total_steps":
                continue
            what = f"{key}={ours}, got {theirs}"
            if key == "schedule":
                what = f"a schedule that gives {ours} at progress {', '.join(map(str, _PROBES))}, got {theirs}"
            elif key == "end_step" and self.total_steps != state.get("total_steps"):
                total = state.get("total_steps")
                what = f"total_steps={self.total_steps} (end_step={ours}), got {total} (end_step={theirs})"
            raise ValueError(
                f"expected a controller state with {printable(what, 1000)}; give sparsify the settings of the run "
                "you resume"
            )

    def _require_allocation(self) -> None:
        if not callable(self.allocation):
            hint = "per_layer({...}) for rates, from_plan({...}) for zeros"
            hint = hint if isinstance(self.allocation, Mapping) else "for example allocations.erk"
            raise TypeError(
                "expected allocation to be a function (weights, zeros, guards) -> groups, got "
                f"{type(self.allocation).__name__}; use one of feather_param.allocations, {hint}"
            )
        if not takes(self.allocation, 3):
            raise TypeError(
                "expected allocation to be a function (weights, zeros, guards) -> groups, got "
                f"{name_of(self.allocation)}, which takes other arguments; call it if it returns an allocation, as "
                "per_layer({...}) does, or wrap a function of name and weight: in_proportion(function)"
            )

    def _fraction(self, progress: float) -> float:
        """Return the value of the schedule. It may be the user's function, so its result is checked."""
        value = self.schedule(progress)
        if not isinstance(value, Real) or not 0.0 <= float(value) <= 1.0:
            raise ValueError(
                f"expected schedule to return a fraction in [0, 1] of final_rate, got {value!r} for progress {progress}"
            )
        return float(value)

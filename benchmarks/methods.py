"""The methods that the CIFAR-100 table compares, as settings of `feather_param.sparsify`.

All methods have the same training recipe, and reach the final rate at half of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import feather_param
from feather_param import schedules

__all__ = ["DENSE", "METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """One method to make a network sparse during the training.

    Attributes:
        about: a short description.
        p: exponent of the operator.
        theta: scale of the gradient of pruned weights: a number, a function of the current rate, or None for the rule
            of the paper.
        schedule: the schedule of the rate.
        frozen: whether the network is pruned once, at half of the steps, and its mask is frozen from then on.
    """

    about: str
    p: float = 3.0
    theta: float | Callable[[float], float] | None = None
    schedule: schedules.Schedule = schedules.cubic
    frozen: bool = False

    def apply(self, model: nn.Module, rate: float, total_steps: int) -> feather_param.Controller:
        """Sparsify a model with this method."""
        half = total_steps // 2
        return feather_param.sparsify(
            model,
            final_rate=rate,
            total_steps=total_steps,
            start_step=half if self.frozen else 0,
            end_step=half,
            schedule=self.schedule,
            p=self.p,
            theta=self.theta,
        )

    def freezes_after(self, step: int, total_steps: int) -> bool:
        """Return whether the mask is frozen after this step."""
        return self.frozen and step == total_steps // 2


DENSE = "dense"

METHODS = {
    "feather": Method("p = 3, theta 0.5 above a rate of 0.95, else 1"),
    "hard": Method("hard threshold, straight through", p=math.inf),
    "soft": Method("soft threshold, straight through", p=1.0),
    "theta_1": Method("p = 3, theta 1 throughout", theta=1.0),
    "theta_0.5": Method("p = 3, theta 0.5 throughout", theta=0.5),
    "one_shot": Method("by magnitude at half time, then held", p=math.inf, schedule=schedules.constant, frozen=True),
    "gradual": Method("gradual by magnitude, no gradient to pruned weights", p=math.inf, theta=0.0),
    # Beyond the paper: theta as a function of the current rate, and another schedule.
    "theta_falling": Method("p = 3, theta = 1 - rate / 2", theta=lambda rate: 1.0 - rate / 2),
    "theta_vanishing": Method("p = 3, theta = 1 - rate", theta=lambda rate: 1.0 - rate),
    "theta_late": Method(
        "p = 3, theta 1 up to a rate of 0.95, 0.25 above", theta=lambda rate: 1.0 if rate <= 0.95 else 0.25
    ),
    "linear": Method("as feather, with a linear schedule", schedule=schedules.linear),
}
"""The methods by name. The first seven are those of the paper's protocol."""

"""The methods that the CIFAR-100 table compares, as settings of `feather_param.sparsify`.

All methods have the same training recipe. They reach the final rate at half of the steps, unless they say otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import feather_param
from feather_param import allocations, schedules

__all__ = ["DENSE", "METHODS", "Method", "mirror_factor", "mirror_step"]


@dataclass(frozen=True)
class Method:
    """One method to make a network sparse during the training.

    Attributes:
        about: a short description.
        p: exponent of the operator.
        theta: scale of the gradient of pruned weights: a number, a function of the current rate, or None for the rule
            of the paper.
        schedule: the schedule of the rate.
        start: where the schedule starts, as a fraction of the steps.
        end: where it ends, as a fraction of the steps.
        freeze: where the masks are fixed, as a fraction of the steps; None for never.
        allocation: name of an allocation of `feather_param.allocations`; None for the default.
        guard: the smallest number of survivors of a weight, as a fraction of the mean number over the weights.
        average: decay of a moving average of the weights, which is evaluated instead of the trained network; None for
            no average.
        mirror: whether each step of the optimizer is followed by `mirror_step`.
    """

    about: str
    p: float = 3.0
    theta: float | Callable[[float], float] | None = None
    schedule: schedules.Schedule = schedules.cubic
    start: float = 0.0
    end: float = 0.5
    freeze: float | None = None
    allocation: str | None = None
    guard: float = 0.0
    average: float | None = None
    mirror: bool = False

    def settings(self, model: nn.Module, rate: float, total_steps: int) -> dict[str, Any]:
        """Return the arguments of `feather_param.sparsify` for a model."""
        settings: dict[str, Any] = {
            "final_rate": rate,
            "total_steps": total_steps,
            "start_step": int(self.start * total_steps),
            "end_step": int(self.end * total_steps),
            "schedule": self.schedule,
            "p": self.p,
            "theta": self.theta,
        }
        if self.guard:
            plan = feather_param.plan(model, final_rate=rate)
            settings["min_nonzero_per_layer"] = int(self.guard * (plan.total - plan.zeros) / len(plan.rows))
        if self.allocation is not None:
            settings["allocation"] = getattr(allocations, self.allocation)
        return settings

    def apply(self, model: nn.Module, rate: float, total_steps: int) -> feather_param.Controller:
        """Sparsify a model with this method."""
        return feather_param.sparsify(model, **self.settings(model, rate, total_steps))

    def freeze_step(self, total_steps: int) -> int | None:
        """Return the number of steps after which the masks are fixed; None for never."""
        return None if self.freeze is None else int(self.freeze * total_steps)


def mirror_factor(
    weight: Tensor, gradient: Tensor, lr: float | Tensor, alpha: float = 200.0, beta: float = 1e-3
) -> Tensor:
    """Return the factor ``exp(lr * (-alpha * sign(w) * g - beta))`` of each weight w with gradient g.

    It is the mirror step of HAM. HAM limits the norm of the gradient to 20; the recipe limits it to 3 already.

    Args:
        weight: the weight after the step of the optimizer.
        gradient: its gradient in this step.
        lr: learning rate.
        alpha: strength of the gradient in the exponent.
        beta: strength of the decay.

    Source: Jacobs et al. 2026, "Hyperbolic Aware Minimization" (https://arxiv.org/abs/2506.02630). The defaults are
    those of the authors' code (https://github.com/TomJacobs05/HAM).
    """
    return torch.exp(-lr * (alpha * weight.sign() * gradient + beta))


@torch.no_grad()
def mirror_step(optimizer: torch.optim.Optimizer, alpha: float = 200.0, beta: float = 1e-3) -> None:
    """Multiply each weight by its `mirror_factor`, after the optimizer has made its step.

    Vectors (biases, batch norm) and weights without a gradient are left out.
    """
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.ndim > 1 and weight.grad is not None:
                weight.mul_(mirror_factor(weight, weight.grad, group["lr"], alpha, beta))


DENSE = "dense"

METHODS = {
    "feather": Method("p = 3, theta 0.5 above a rate of 0.95, else 1"),
    "hard": Method("hard threshold, straight through", p=math.inf),
    "soft": Method("p = 1: soft threshold, straight through", p=1.0),
    "theta_1": Method("p = 3, theta 1 throughout", theta=1.0),
    "theta_0.5": Method("p = 3, theta 0.5 throughout", theta=0.5),
    "one_shot": Method("once at half time, then held", p=math.inf, schedule=schedules.constant, start=0.5, freeze=0.5),
    "gradual": Method("gradual by magnitude, no gradient to pruned weights", p=math.inf, theta=0.0),
    # Beyond the paper: theta as a function of the current rate, and another schedule.
    "theta_falling": Method("p = 3, theta = 1 - rate / 2", theta=lambda rate: 1.0 - rate / 2),
    "theta_vanishing": Method("p = 3, theta = 1 - rate", theta=lambda rate: 1.0 - rate),
    "theta_late": Method("p = 3, theta 1 up to 0.95, 0.25 above", theta=lambda rate: 1.0 if rate <= 0.95 else 0.25),
    "linear": Method("as feather, with a linear schedule", schedule=schedules.linear),
    # Beyond the paper: a smaller p, and other allocations of the zeros.
    "p_0.5": Method("p = 1/2", p=0.5),
    "erk": Method("p = 3, allocation erk", allocation="erk"),
    "lamp": Method("p = 3, allocation lamp", allocation="lamp"),
    "square_root": Method("p = 3, allocation square_root", allocation="square_root"),
    "normalised": Method("p = 3, allocation normalised", allocation="normalised"),
    "uniform": Method("p = 3, allocation uniform", allocation="uniform"),
    "guard": Method("p = 3, each layer keeps a quarter of the mean number of survivors or more", guard=0.25),
    "p_0.5_square_root": Method("p = 1/2, allocation square_root", p=0.5, allocation="square_root"),
    # Beyond the paper: other ways to train.
    "late_freeze": Method("p = 3, masks fixed at 75 % of the steps", freeze=0.75),
    "late_end": Method("p = 3, final rate at 75 % of the steps", end=0.75),
    "warm_up": Method("p = 3, dense for 25 % of the steps", start=0.25),
    "ema": Method("p = 3, evaluates a moving average with decay 0.99", average=0.99),
    "ham": Method("p = 3, HAM's mirror step after each step of the optimizer", mirror=True),
}
"""The methods by name. The first seven are those of the paper's protocol."""

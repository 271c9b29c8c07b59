"""The settings of a controller, as they travel in its state: a run may only be resumed with the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from feather_param import checks
from feather_param.allocation import Budget
from feather_param.schedules import Schedule

__all__ = ["describe", "require_same"]

_VERSION = 1

# Where two schedules are compared, and two functions of the rate: a function itself cannot travel.
_PROBES = (0.0, 0.25, 0.5, 0.75, 1.0)


def describe(
    weights: Mapping[str, Tensor],
    budget: Budget,
    *,
    final_rate: float,
    total_steps: int,
    start_step: int,
    end_step: int,
    schedule: Schedule,
    p: float,
    theta: float | checks.Theta,
) -> dict[str, Any]:
    """Return the settings in plain Python values."""
    return {
        "version": _VERSION,
        "final_rate": final_rate,
        "total_steps": total_steps,
        "start_step": start_step,
        "end_step": end_step,
        "schedule": [checks.fraction(schedule, progress) for progress in _PROBES],
        "p": p,
        "theta": [checks.slope_at(theta, at * final_rate) for at in _PROBES] if callable(theta) else theta,
        "max_rate_per_layer": budget.max_rate,
        "min_nonzero_per_layer": budget.min_nonzero,
        "weights": {name: list(weight.shape) for name, weight in weights.items()},
    }


def require_same(ours: Mapping[str, Any], state: Any) -> None:
    """Raise a ValueError unless a controller's state was saved with our settings."""
    if not isinstance(state, Mapping) or not {"version", "step_count", "frozen_step"} <= state.keys():
        raise ValueError("expected the state_dict of a feather_param Controller, got something else")
    if state["version"] != _VERSION:
        raise ValueError(
            f"expected a controller state of version {_VERSION}, got {state['version']}; "
            "load it with the feather_param release that wrote it"
        )
    for key, our in ours.items():
        their = state.get(key)
        if their == our or key == "total_steps":  # it counts through end_step alone: a run may be made longer
            continue
        if key == "weights":
            raise ValueError(f"expected a controller state of this model, got another's: {_differ(our, their)}")
        what = f"{key}={our}, got {their}"
        if key == "schedule":
            what = f"a schedule that gives {our} at progress {', '.join(map(str, _PROBES))}, got {their}"
        elif key == "end_step" and (steps := ours["total_steps"]) != state.get("total_steps"):
            what = f"total_steps={steps} (end_step={our}), got {state.get('total_steps')} (end_step={their})"
        raise ValueError(f"expected a controller state with {what}; give sparsify the settings of the run you resume")


def _differ(ours: dict[str, list[int]], theirs: Any) -> str:
    theirs = theirs if isinstance(theirs, Mapping) else {}
    for name, shape in ours.items():
        if theirs.get(name) != shape:
            return f"{name} has shape {tuple(shape)} here and {tuple(theirs.get(name) or ()) or 'no entry'} there"
    return f"it also has {next(name for name in theirs if name not in ours)}"

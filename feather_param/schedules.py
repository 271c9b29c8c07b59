"""Schedules: when weights are pruned, as pure functions from progress to a fraction of the final rate.

``progress`` runs from 0 at ``start_step`` to 1 at ``end_step``. To add a schedule, write such a function.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Schedule", "constant", "cubic", "linear"]

Schedule = Callable[[float], float]
"""Maps progress in [0, 1] to a fraction of the final rate, in [0, 1]."""


def cubic(progress: float) -> float:
    """Prune fast at first and slowly at the end: ``1 - (1 - progress)^3``.

    Source: the schedule of gradual pruning (https://arxiv.org/abs/1710.01878), used by Feather.

    Example:
        >>> cubic(0.5)
        0.875
    """
    return 1.0 - (1.0 - progress) ** 3


def linear(progress: float) -> float:
    """Prune at a constant pace: ``progress``.

    Example:
        >>> linear(0.5)
        0.5
    """
    return progress


def constant(progress: float) -> float:
    """Prune in one shot: the full rate from ``start_step`` on.

    Example:
        >>> constant(0.0)
        1.0
    """
    return 1.0

"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Sequence

__all__ = ["warn", "warn_of_dead", "warn_of_early"]


def warn(message: str) -> None:
    """Warn from the nearest caller outside this library and torch, so that each line of the user's warns once."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("feather_param", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def warn_of_dead(names: Sequence[str], tied: Collection[str] = ()) -> None:
    """Warn of weights of which nothing survives; of some of them because all that is kept equals the threshold."""
    if not names:
        return
    hint = "lower final_rate, or leave these dense with exclude"
    if ties := [name for name in names if name in tied]:
        hint += (
            f"; all that is kept of {', '.join(ties)} equals the threshold (weights clipped to one magnitude?), and "
            "the operator makes that zero: clip to a wider range"
        )
    warn(f"nothing survives in {', '.join(names)}: the network behind gets a constant; {hint}")


def warn_of_early(call: str, zeros: int, aim: int) -> None:
    """Warn of a call that makes zeros final before there are as many as were asked for."""
    purpose = "; to stop early on purpose, call freeze() first" if zeros else ""
    warn(
        f"expected {call} after the {aim:,} zeros of final_rate are reached, got it at {zeros:,}: call "
        "controller.step() after each optimizer.step(), or pass optimizer= to sparsify; of saved states, bake one from "
        f"end_step on{purpose}"
    )

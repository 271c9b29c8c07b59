"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings


def warn(message: str) -> None:
    """Warn from the nearest caller outside this library and torch, so that each line of the user's warns once."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("feather_param", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def warn_of_early(call: str, zeros: int, aim: int) -> None:
    """Warn of a call that makes zeros final before there are as many as were asked for."""
    purpose = "; to stop early on purpose, call freeze() first" if zeros else ""
    warn(
        f"expected {call} after the {aim:,} zeros of final_rate are reached, got it at {zeros:,}: call "
        "controller.step() after each optimizer.step(), or pass optimizer= to sparsify; of saved states, bake one from "
        f"end_step on{purpose}"
    )

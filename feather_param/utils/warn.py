"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings

from feather_param.utils.text import LONGEST_MESSAGE, printable


def warn(message: str) -> None:
    """Warn with the line of the nearest caller outside of this library and torch, so that each such line warns once.

    The message is `printable`, because it names weights.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("feather_param", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(printable(message, LONGEST_MESSAGE), stacklevel=level)

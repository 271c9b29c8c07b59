"""Count the lines of Python that a call runs, and see from the counts how its cost grows with the size of a model."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

LAYERS = 2000  # the size of a model at which the quadratic part of a cost must not be larger than the linear part


class Lines:
    """The number of lines that were run, of files whose path contains a text."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.count = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Count an event of `sys.settrace`: a call, a line, or a return."""
        if event == "call" and self._path not in frame.f_code.co_filename:
            return None
        self.count += 1
        return self


@contextmanager
def counted(path: str = "") -> Iterator[Lines]:
    """Count the lines that are run in a block. The result is the same in each run: there is no time in it."""
    lines, before = Lines(path), sys.gettrace()
    gc.disable()
    sys.settrace(lines)
    try:
        yield lines
    finally:
        sys.settrace(before)
        gc.enable()


def growth(prepare: Callable[[int], Callable[[], object]], size: int, path: str = "") -> tuple[float, float]:
    """Return the linear and the quadratic coefficient of a cost, in lines of Python.

    Loops inside of functions written in C are not counted.

    Args:
        prepare: maps the size of a model to the call whose cost is counted.
        size: the smallest size. The cost is counted at this size, and at two and three times the size.
        path: count only lines of files whose path contains this text.
    """
    prepare(3 * size)()  # fills caches
    costs: list[int] = []
    for n in (size, 2 * size, 3 * size):
        call = prepare(n)
        with counted(path) as lines:
            call()
        costs.append(lines.count)
    quadratic = (costs[2] - 2 * costs[1] + costs[0]) / (2 * size**2)
    return (costs[1] - costs[0]) / size - 3 * size * quadratic, quadratic


def is_linear(linear: float, quadratic: float) -> bool:
    """Return whether the quadratic part of a cost is at most the linear part, in a model of `LAYERS` layers."""
    return quadratic * LAYERS <= linear

"""How the time of a function grows."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable

# The CPU time of Windows advances in steps of 16 ms.
_clock = time.perf_counter if sys.platform == "win32" else time.process_time


def times_as_long(function: Callable[[int], object], n: int) -> float:
    """Return how many times as long a function takes for 4n as for n: about 4 if it is linear, 16 if it is quadratic.

    It is the CPU time of this process without garbage collection, the least of three runs: other processes and tests
    hardly matter.
    """

    def seconds(size: int) -> float:
        measured = []
        for _ in range(3):
            start = _clock()
            function(size)
            measured.append(_clock() - start)
        return min(measured)

    gc.collect()
    gc.disable()
    try:
        return seconds(4 * n) / max(seconds(n), 1e-4)
    finally:
        gc.enable()

"""Whether the time of a function is linear."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable

# The CPU time of Windows advances in steps of 16 ms.
_clock = time.perf_counter if sys.platform == "win32" else time.process_time


def is_linear(function: Callable[[int], object], n: int) -> bool:
    """Return whether a function takes nearer to 8 than to 64 times as long for 8n as for n (64 if it is quadratic).

    It is the CPU time of this process without garbage collection, the least of three runs: other processes and tests
    hardly matter.
    """
    least = {n: math.inf, 8 * n: math.inf}
    gc.collect()
    gc.disable()
    try:
        for size in 3 * [*least]:
            start = _clock()
            function(size)
            least[size] = min(least[size], _clock() - start)
    finally:
        gc.enable()
    return least[8 * n] < math.sqrt(8 * 64) * max(least[n], 1e-4)

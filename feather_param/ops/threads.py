"""Work on many elements, shared out over threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

# With fewer elements than this, threads take longer than they save: torch's own still spin for a while on their cores.
_FEWEST = 1 << 23


def in_threads(work: Callable[[int, int], T], elements: int) -> list[T]:
    """Return the results of ``work(i, threads)`` for each of as many threads as so many elements are worth.

    What is called has to release the GIL, as numpy does, and should not call torch with many elements, which would
    start threads of its own in each.
    """
    threads = torch.get_num_threads() if elements > _FEWEST else 1
    if threads == 1:
        return [work(0, 1)]
    with ThreadPoolExecutor(threads - 1) as pool:
        others: list[Future[T]] = []
        try:
            while len(others) < threads - 1:
                others.append(pool.submit(work, len(others) + 1, threads))
        except RuntimeError:  # the interpreter is shutting down and starts no more: what is left is done here
            pass
        here = [work(i, threads) for i in (0, *range(len(others) + 1, threads))]
        return here + [other.result() for other in others]

"""Run work on many elements in several threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

# Below this number of elements, threads take more time than they save: for a while after its own work, torch's threads
# keep the cores busy.
_MIN_ELEMENTS = 1 << 23


def in_threads(work: Callable[[int, int], T], elements: int) -> list[T]:
    """Return the results of ``work(i, threads)`` for each i below ``threads``, each from its own thread, in any order.

    Args:
        work: a function that processes the i-th chunk of the elements. It should release the GIL, as numpy does. It
            should not call torch with many elements, because torch would start more threads in each.
        elements: number of elements. A small number is processed by one thread, a larger one by as many threads as
            torch uses.
    """
    threads = torch.get_num_threads() if elements > _MIN_ELEMENTS else 1
    if threads == 1:
        return [work(0, 1)]
    with ThreadPoolExecutor(threads - 1) as pool:
        others: list[Future[T]] = []
        try:
            while len(others) < threads - 1:
                others.append(pool.submit(work, len(others) + 1, threads))
        except RuntimeError:  # the interpreter is shutting down and starts no threads: the rest runs here
            pass
        here = [work(i, threads) for i in (0, *range(len(others) + 1, threads))]
        return here + [other.result() for other in others]

"""Run the kernel between pages that may not be touched. Reading or writing them ends the process."""

from __future__ import annotations

import ctypes
import math
import mmap

import torch

from feather_param.inference.engine import plan
from tests.inference.layer_cases import LAYERS, rows_of
from tests.inference.matrices import bounded, matrix_of
from tests.inference.pruned import pruned

_KEPT = []


def guarded(shape, at_end):
    """Return an empty tensor whose memory ends (or begins) at a page that may not be touched."""
    floats, page = math.prod(shape), mmap.PAGESIZE
    pages = -(-max(1, 4 * floats) // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for guard in (begin, begin + (pages + 1) * page):
        if protect(guard, page, 0):
            raise OSError("mprotect failed")
    _KEPT.append(memory)
    offset = page + (pages * page - 4 * floats if at_end else 0)
    if not floats:
        return torch.empty(shape)
    return torch.frombuffer(memory, dtype=torch.float32, count=floats, offset=offset).view(shape)


def check(layer, shape, rows, at_end, threads):
    """Raise an error if the output is wrong."""
    torch.set_num_threads(threads)
    x = guarded(shape, at_end).normal_()
    planned = plan.Plan(matrix_of(layer, rows, "relu"), shape[:1], shape[2:])
    y = guarded(planned.shape, at_end)
    residual = None if isinstance(layer, torch.nn.Linear) else guarded(y.shape, at_end).normal_()
    planned.run(x, y, residual)
    expected, bound = bounded(layer, x, residual, "relu")
    assert ((y - expected).abs() <= bound).all(), (layer, shape, rows, at_end, threads)


def main():
    for at_end in (True, False):
        plan.new_scratch = lambda floats, at_end=at_end: guarded((floats,), at_end).fill_(math.nan)
        for layer, shape in LAYERS.values():
            for rows in rows_of(pruned(layer, 0.6)):
                for threads in (1, 2) if at_end else (1,):
                    check(layer, shape, rows, at_end, threads)


if __name__ == "__main__":
    main()

"""A sparse weight times shifted rows, compiled by numba: what makes convolutions with many zeros fast on a CPU.

# Note [A convolution is a sum of shifted rows]
Lay the padded input out flat, channel after channel. Moving the window by one pixel then moves every element that it
reads by one, so all outputs of a channel are one sum of slices of equal length, ``weight * x[start : start + n]``, and
where a slice starts depends on the weight's input channel and place in the window alone. Zeros are left out of the sum;
what is left is what vector units do best: no window is copied (im2col), and nothing is gathered. The outputs that lie
over the border between two rows or images are computed with the others and not used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from feather_param.utils.extras import extra

_BLOCK = 1024  # columns whose sums stay in the nearest cache while a row is added up


def sum_of_slices(crow: Any, col: Any, values: Any, starts: Any, x: Any, bias: Any, out: Any, width: int) -> None:
    """Set ``out[i, :width]`` to ``bias[i] + sum(values[p] * x[starts[col[p]] :][:width])``, p over the i-th row.

    The rows are those of a matrix in CSR form. This is plain Python, on one thread; `compiled` returns it as machine
    code.

    Args:
        crow: where each row begins in col and values, int32 [rows + 1].
        col: columns of the elements that are not zero, int32 [n].
        values: these elements, float32 [n].
        starts: where the slice of each column begins in x, int64 [columns].
        x: float32 [m].
        bias: float32 [rows].
        out: float32 [rows, at least width], written in place.
        width: length of the slices; the largest start + width is at most m.

    Example:
        >>> import numpy as np
        >>> x, out = np.arange(6, dtype=np.float32), np.zeros((1, 3), np.float32)
        >>> sum_of_slices([0, 2], [0, 1], [10, 1], [0, 3], x, [100], out, 3)  # 100 + 10 * x[:3] + x[3:]
        >>> out
        array([[103., 114., 125.]], dtype=float32)
    """
    for begin in range(0, width, _BLOCK):
        n = min(_BLOCK, width - begin)
        for i in range(len(crow) - 1):
            total = out[i, begin : begin + n]
            total[:] = bias[i]
            p = crow[i]
            while p + 4 <= crow[i + 1]:  # four at once, for the sum is then read and written a quarter as often
                a, b, c, d = values[p], values[p + 1], values[p + 2], values[p + 3]
                at = begin + starts[col[p]]
                x_a = x[at : at + n]
                at = begin + starts[col[p + 1]]
                x_b = x[at : at + n]
                at = begin + starts[col[p + 2]]
                x_c = x[at : at + n]
                at = begin + starts[col[p + 3]]
                x_d = x[at : at + n]
                for j in range(n):
                    total[j] += a * x_a[j] + b * x_b[j] + c * x_c[j] + d * x_d[j]
                p += 4
            while p < crow[i + 1]:
                a = values[p]
                at = begin + starts[col[p]]
                x_a = x[at : at + n]
                for j in range(n):
                    total[j] += a * x_a[j]
                p += 1


@functools.cache
def compiled() -> Callable[..., None] | None:
    """Return `sum_of_slices` as machine code that lets other threads run, or None if numba is not installed.

    The first call compiles, about a second; nothing is written to disk.

    Example:
        >>> compiled() is None or callable(compiled())
        True
    """
    try:
        njit = extra("numba").njit
    except ImportError:
        return None
    signature = "void(i4[::1], i4[::1], f4[::1], i8[::1], f4[::1], f4[::1], f4[:, ::1], i8)"
    return njit(signature, nogil=True, fastmath={"contract"})(sum_of_slices)  # "contract": fused multiply-add

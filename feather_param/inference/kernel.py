"""Direct sparse convolution on a CPU: a sum of slices of the input, compiled by numba.

Note [A convolution is a sum of shifted rows]

Store the padded input in flat memory, one channel after the other. If the window moves by one pixel, the index of each
element that it reads moves by one. All outputs of a channel are therefore one sum of slices of equal length,
``weight * x[start : start + n]``. The start of a slice depends only on the weight's input channel and its offset in the
window. Weights that are zero are left out of the sum. No window is copied (im2col) and nothing is gathered, so vector
instructions make the inner loop fast. Some outputs lie across the border between two rows or two images. They are
computed with the others and ignored.

Park et al. describe the method in https://arxiv.org/abs/1608.01409.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from feather_param.utils.extras import extra

_BLOCK = 1024  # elements of an output row that are summed at once, so that they stay in the L1 cache


def sum_of_slices(crow: Any, col: Any, values: Any, starts: Any, x: Any, bias: Any, out: Any, width: int) -> None:
    """Set ``out[i, :width]`` to ``bias[i] + sum(values[p] * x[starts[col[p]] :][:width])``, with p over the i-th row.

    The matrix is in CSR format. This function is plain Python; `compiled` returns it as machine code. It runs on one
    thread.

    Args:
        crow: start of each row in ``col`` and ``values``, int32 [rows + 1].
        col: columns of the elements that are not zero, int32 [n].
        values: these elements, float32 [n].
        starts: start of each column's slice in ``x``, int64 [columns].
        x: the input, float32 [m].
        bias: float32 [rows].
        out: the output, float32 [rows, at least width]. It is written in place.
        width: length of the slices. The largest start + width is at most m.

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
            while p + 4 <= crow[i + 1]:  # four at once, to read and write the sum a quarter as often
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
    """Return `sum_of_slices` as machine code, or None if numba is not installed. The code releases the GIL.

    The first call compiles it, in about a second. Nothing is cached on the disk.

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

"""Machine code that transposes a matrix."""

from __future__ import annotations

from llvmlite import ir

from feather_param.inference.engine.job import LANES
from feather_param.inference.engine.writer import I64, POINTER, Value, Writer, integer


def write_transpose(module: ir.Module) -> ir.Function:
    """Write a function that transposes a matrix.

    Its parameters: the matrix, floats from a row to the next, the result, floats from a row to the next, and the rows
    and columns of the matrix.
    """
    w = Writer(module, "transpose", [POINTER, I64, POINTER, I64, I64, I64])
    w.function_.attributes.add("noinline")
    w.function_.linkage = "internal"
    source, source_row, target, target_row, rows, columns = w.arguments
    whole_rows = w.sub(rows, w.srem(rows, integer(LANES)))
    whole_columns = w.sub(columns, w.srem(columns, integer(LANES)))

    def block(i: Value, j: Value) -> None:
        x = [w.floats(source, w.add(w.mul(w.add(i, integer(k)), source_row), j)) for k in range(LANES)]
        for step in (8, 4, 2, 1):  # swap the blocks of this size beside the diagonal
            low = [lane if not lane & step else lane - step + LANES for lane in range(LANES)]
            high = [lane + step if not lane & step else lane + LANES for lane in range(LANES)]
            y = list(x)
            for k in range(LANES):
                if not k & step:
                    y[k], y[k + step] = w.shuffled(x[k], x[k + step], low), w.shuffled(x[k], x[k + step], high)
            x = y
        for k in range(LANES):
            w.put(x[k], target, w.add(w.mul(w.add(j, integer(k)), target_row), i))

    def one(i: Value, j: Value) -> None:
        w.put(w.float_(source, w.add(w.mul(i, source_row), j)), target, w.add(w.mul(j, target_row), i))

    w.loop(
        integer(0),
        whole_columns,
        lambda j: w.loop(integer(0), whole_rows, lambda i: block(i, j), step=LANES) and None,
        step=LANES,
    )
    w.loop(whole_columns, columns, lambda j: w.loop(integer(0), whole_rows, lambda i: one(i, j)) and None)
    w.loop(integer(0), columns, lambda j: w.loop(whole_rows, rows, lambda i: one(i, j)) and None)
    w.ret_void()
    return w.function_

"""Machine code that fills a channel of the grid."""

from __future__ import annotations

from llvmlite import ir

from feather_param.inference.engine.job import LANES
from feather_param.inference.engine.writer import F32, I32, POINTER, Job, Value, Writer, integer

_EVEN = [2 * lane for lane in range(LANES // 2)] + [2 * lane + 1 for lane in range(LANES // 2, LANES)]


def write_copy(module: ir.Module) -> ir.Function:
    """Write a function that copies a channel of the input into the grid, with its padding.

    Its parameters: the job, the channel in the input, and the channel in the grid.

    The rows are written in the order of the grid. A row and the padding up to the next are written in whole vectors:
    what they write too much is overwritten by the next row, or lies in the gap at the end of the channel.
    """
    w = Writer(module, "copy", [POINTER, POINTER, POINTER])
    w.function_.attributes.add("noinline")
    w.function_.linkage = "internal"
    _, source, target = w.arguments
    job = Job(w)
    targets, sources, counts = (job.pointer(name) for name in ("row_target", "row_source", "row_count"))
    stride = job.stride
    fill = w.spread(w.bitcast(w.trunc(job.fill, I32), F32))
    zero, lanes = integer(0), integer(LANES)

    def row(r: Value) -> None:
        first = w.index(targets, r)
        from_, to, count = w.at(source, w.index(sources, r)), w.at(target, first), w.index(counts, r)
        size = w.sub(w.index(targets, w.add(r, integer(1))), first)
        whole = w.and_(count, integer(-LANES))
        rest = w.smaller(w.sub(count, whole), lanes)

        def pad(begin: Value) -> None:
            w.loop(begin, size, lambda i: w.put(fill, to, i), step=LANES)

        def next_to_each_other() -> None:
            w.loop(zero, whole, lambda i: w.put(w.floats(from_, i), to, i), step=LANES)
            with w.if_then(w.icmp_signed("<", whole, size)):
                w.put(w.some_floats(from_, whole, w.mask(w.lanes(rest)), fill), to, whole)
            pad(w.add(whole, lanes))

        def every_second() -> None:
            def sixteen(i: Value) -> None:
                begin = w.mul(i, integer(2))
                low, high = w.floats(from_, begin), w.floats(from_, w.add(begin, integer(LANES - 1)))
                w.put(w.shuffled(low, high, _EVEN), to, i)

            w.loop(zero, whole, sixteen, step=LANES)
            with w.if_then(w.icmp_signed("<", whole, size)):
                begin = w.mul(whole, integer(2))
                read = w.lanes(w.larger(zero, w.sub(w.mul(rest, integer(2)), integer(1))))
                low = w.some_floats(from_, begin, w.mask(read), fill)
                later = w.mask(w.lshr(read, ir.Constant(I32, LANES - 1)))
                high = w.some_floats(from_, w.add(begin, integer(LANES - 1)), later, fill)
                w.put(w.shuffled(low, high, _EVEN), to, whole)
            pad(w.add(whole, lanes))

        def apart() -> None:
            w.loop(zero, count, lambda i: w.put(w.float_(from_, w.mul(i, stride)), to, i))
            pad(count)

        w.choose(stride, {1: next_to_each_other, 2: every_second}, apart)

    w.loop(zero, job.grid_rows, row)
    w.ret_void()
    return w.function_

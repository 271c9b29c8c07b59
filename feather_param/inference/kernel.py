"""Machine code for sparse convolutions and products on a CPU.

Note [A convolution is a sum of shifted rows]

Store the padded input in flat memory, one channel after the other (the grid, see `feather_param.inference.layout`). If
the window moves by one pixel, the index of each element that it reads moves by one. 16 outputs of a channel that lie
side by side are therefore a sum of vectors, ``weight * grid[position + offset : position + offset + 16]``. The position
depends only on the outputs, and the offset only on the weight: its input channel and its place in the window. Weights
that are zero are left out of the sum. No window is copied (im2col) and nothing is gathered. Park et al. describe the
method in https://arxiv.org/abs/1608.01409.

The sums of a tile (four vectors) stay in registers while all weights of an output channel are added. The inputs of a
tile stay in the cache while all output channels are computed. Where blocks of four output channels have the same zeros,
each vector of inputs is loaded once for the four.
"""

from __future__ import annotations

import ctypes
import enum
import functools
from collections.abc import Sequence
from typing import Any

import torch
from llvmlite import binding, ir

from feather_param.inference.machine_code import (
    F32,
    I1,
    I32,
    I64,
    LANES,
    POINTER,
    VECTOR,
    VOID,
    MachineCode,
    Value,
    Writer,
    integer,
    vector,
)

TILE = {1: 4, 4: 2}
"""Vectors in a tile, for blocks of 1 and of 4 rows. The sums, 4 or 8 vectors, fit in registers."""


class Activation(enum.IntEnum):
    """What is applied to the sums."""

    IDENTITY = 0
    RELU = 1
    RELU6 = 2
    SILU = 3
    HARDSWISH = 4


class Slot(enum.IntEnum):
    """The fields of a job, which is an array of int64: the pointers and numbers that a call of the kernel needs."""

    threads = 0
    input = enum.auto()
    output = enum.auto()
    residual = enum.auto()  # 0 if there is none
    scratch = enum.auto()  # memory for the grids
    images = enum.auto()
    input_image = enum.auto()  # floats from an image to the next
    output_image = enum.auto()
    output_row = enum.auto()  # floats from an output channel to the next
    groups = enum.auto()
    input_group = enum.auto()  # floats from a group's input to the next group's
    group_blocks = enum.auto()  # blocks of rows in a group
    block_rows = enum.auto()  # 1 or 4; 0: the maximum of the elements in the window (max pooling)
    block_start = enum.auto()  # int32 [blocks + 1]: first offset of each block
    offsets = enum.auto()  # int32: of each weight (or each column of a block) that is not zero, from the position
    values = enum.auto()  # float32 [offsets, block_rows]
    bias = enum.auto()  # float32 [rows]
    activation = enum.auto()
    low = enum.auto()  # bits of the floats that limit the output
    high = enum.auto()
    tokens = enum.auto()  # 0, or vectors in an image of a product: rows of the input and the output, to be transposed
    channels = enum.auto()  # of such a row of the input
    output_rows = enum.auto()  # output channels
    scratch_floats = enum.auto()  # of a thread
    shares = enum.auto()  # parts into which the blocks are divided; each takes about the same time
    share_start = enum.auto()  # int32 [shares + 1]: first block of each share
    vectors = enum.auto()  # number of vectors of outputs
    position = enum.auto()  # int32 [vectors]
    segment_start = enum.auto()  # int32 [vectors + 1]: first segment of each vector
    segment_output = enum.auto()  # int32: index of the output that lane 0 would have
    segment_lanes = enum.auto()  # int32: bits of the lanes that are outputs
    plain = (
        enum.auto()
    )  # int32 [tiles]: index of the first output if all lanes of the tile are contiguous outputs, or -1
    copies = enum.auto()  # 0: the input is the grid. Otherwise planes (channels) of a group's grid to fill
    plane_images = enum.auto()  # images in a grid
    plane_image = enum.auto()  # floats from an image of the input to the next that is in the same grid
    input_plane = enum.auto()  # floats from a channel of the input to the next
    grid_plane = enum.auto()  # floats from a channel of the grid to the next
    grid_image = enum.auto()  # floats from an image of the grid to the next
    grid_floats = enum.auto()  # floats of a grid
    grid_rows = enum.auto()  # rows of an image of the grid, of all phases
    row_target = enum.auto()  # int32 [grid rows]: index of the row's first element in its image
    row_source = enum.auto()  # int32 [grid rows]: index of the row's first element in the input's plane
    row_count = enum.auto()  # int32 [grid rows]: elements of the row
    stride = enum.auto()  # between the elements of the input in a row
    fill = enum.auto()  # bits of the float that pads


class _Job:
    """Reads the fields of a job."""

    def __init__(self, w: Writer, pointer: Value) -> None:
        self._w, self._pointer = w, pointer

    def __getattr__(self, name: str) -> Value:
        return self._w.load(self._w.at(self._pointer, integer(Slot[name]), I64), typ=I64)

    def pointer(self, name: str) -> Value:
        return self._w.inttoptr(getattr(self, name), POINTER)


def _write_smooth(module: ir.Module) -> ir.Function:
    """Write a function that returns SiLU or Hardswish of a vector. Its parameters: the vector and the activation."""
    w = Writer(module, "smooth", [VECTOR, I64], VECTOR)
    w.function_.attributes.add("noinline")
    x, activation = w.arguments
    with w.if_then(w.icmp_signed("==", activation, integer(Activation.HARDSWISH))):
        shifted = _clamped(w, w.fadd(x, vector(3.0)), vector(0.0), vector(6.0))
        w.ret(w.fmul(x, w.fdiv(shifted, vector(6.0))))
    w.ret(w.fdiv(x, w.fadd(vector(1.0), _exponential(w, w.fneg(x)))))
    return w.function_


def _clamped(w: Writer, x: Value, low: Value, high: Value) -> Value:
    """Return a vector with its elements limited. NaN stays NaN."""
    x = w.select(w.fcmp_ordered("<", x, low), low, x)
    return w.select(w.fcmp_ordered(">", x, high), high, x)


class _Epilogue:
    """Writes what follows the sums: the activation."""

    def __init__(self, w: Writer, job: _Job) -> None:
        self._w = w
        self._activation = job.activation
        self._low, self._high = (w.spread(w.bitcast(w.trunc(getattr(job, n), I32), F32)) for n in ("low", "high"))
        self._smooth = w.icmp_signed("<", integer(Activation.RELU6), self._activation)

    def __call__(self, sums: Sequence[Value]) -> list[Value]:
        w = self._w
        clamped = [_clamped(w, x, self._low, self._high) for x in sums]
        before = w.block
        with w.if_then(self._smooth):
            smooth = [w.call(w.function_.module.get_global("smooth"), [x, self._activation]) for x in sums]
            inside = w.block
        return [w.either(VECTOR, (x, before), (y, inside)) for x, y in zip(clamped, smooth, strict=True)]


def _exponential(w: Writer, x: Value) -> Value:
    """Return exp(x), to about one rounding, for a vector; infinity above 88.7 and 0 below -87.3.

    x = n log(2) + r with an integer n and |r| <= log(2) / 2. exp(r) is a polynomial, and 2**n a float of these bits.
    """
    wide = ir.VectorType(I32, LANES)

    def number(value: int) -> Value:
        return ir.Constant(wide, [value] * LANES)

    low, high = w.fcmp_ordered("<", x, vector(-87.33)), w.fcmp_ordered(">", x, vector(88.72))
    bounded = w.select(low, vector(-87.33), w.select(high, vector(88.72), x))
    n = w.intrinsic("llvm.rint", w.fmul(bounded, vector(1.4426950408889634)))
    r = w.multiply_add(n, vector(-0.693359375), bounded)
    r = w.multiply_add(n, vector(2.12194440e-4), r)  # the rest of log(2), so that r is exact
    sum_ = vector(1 / 5040)
    for term in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        sum_ = w.multiply_add(sum_, r, vector(term))
    power = w.fptosi(n, wide)
    half = w.ashr(power, number(1))
    for part in (half, w.sub(power, half)):  # 2**n in two steps: n may be 128
        sum_ = w.fmul(sum_, w.bitcast(w.shl(w.add(part, number(127)), number(23)), VECTOR))
    return w.select(low, vector(0.0), w.select(high, vector(float("inf")), sum_))


def _write_tile(module: ir.Module, rows: int, width: int) -> ir.Function:
    """Write a function that computes blocks of output channels for a tile of some vectors.

    Its parameters: the job, the grid, the output and the residual of the image, the first vector, the index of the first
    contiguous output (or -1), the first block and the last.
    """
    w = Writer(module, f"tile_{rows}_{width}", [POINTER, POINTER, POINTER, POINTER, I64, I64, I64, I64])
    w.function_.attributes.add("noinline")
    pointer, grid, output, residual, first, plain, begin, end = w.arguments
    job = _Job(w, pointer)
    maximum = rows == 0
    height = max(1, rows)
    positions = [w.at(grid, w.index(job.pointer("position"), w.add(first, integer(t)))) for t in range(width)]
    offsets, values, starts, bias = (job.pointer(name) for name in ("offsets", "values", "block_start", "bias"))
    segments, lanes, outputs = (job.pointer(name) for name in ("segment_start", "segment_lanes", "segment_output"))
    row_size = job.output_row
    has_residual = w.icmp_signed("!=", job.residual, integer(0))
    epilogue = _Epilogue(w, job)

    def block(i: Value) -> None:
        row = w.mul(i, integer(height))
        if maximum:
            sums = [vector(float("-inf"))] * width
        else:
            sums = [w.spread(w.float_(bias, w.add(row, integer(r)))) for r in range(height) for _ in range(width)]

        def add(p: Value, *sums: Value) -> list[Value]:
            offset = w.index(offsets, p)
            x = [w.floats(position, offset) for position in positions]
            if maximum:
                return [_largest(w, a, b) for a, b in zip(x, sums, strict=True)]
            at = w.mul(p, integer(height))
            weights = [w.spread(w.float_(values, w.add(at, integer(r)))) for r in range(height)]
            return [w.multiply_add(weights[j // width], x[j % width], s) for j, s in enumerate(sums)]

        sums = w.loop(w.index(starts, i), w.index(starts, w.add(i, integer(1))), add, sums)
        for r in range(height):
            at = w.mul(w.add(row, integer(r)), row_size)
            store(at, sums[r * width : (r + 1) * width])

    def store(at: Value, sums: Sequence[Value]) -> None:
        with w.if_else(w.icmp_signed(">=", plain, integer(0))) as (contiguous, scattered):
            with contiguous:
                store_contiguous(w.add(at, plain), sums)
            with scattered:
                for t, value in enumerate(sums):
                    store_segments(at, w.add(first, integer(t)), value)

    def store_contiguous(at: Value, sums: Sequence[Value]) -> None:
        places = [w.add(at, integer(LANES * t)) for t in range(width)]
        before = w.block
        with w.if_then(has_residual):
            added = [w.fadd(value, w.floats(residual, place)) for value, place in zip(sums, places, strict=True)]
            inside = w.block
        totals = [w.either(VECTOR, (a, before), (b, inside)) for a, b in zip(sums, added, strict=True)]
        for value, place in zip(epilogue(totals), places, strict=True):
            w.put(value, output, place)

    def store_segments(at: Value, which: Value, value: Value) -> None:
        def segment(s: Value) -> None:
            place = w.add(at, w.index(outputs, s))
            mask = w.mask(w.load(w.at(lanes, s, I32), typ=I32))
            before = w.block
            with w.if_then(has_residual):
                added = w.fadd(value, w.some_floats(residual, place, mask))
                inside = w.block
            (total,) = epilogue([w.either(VECTOR, (value, before), (added, inside))])
            w.put_some(total, output, place, mask)

        w.loop(w.index(segments, which), w.index(segments, w.add(which, integer(1))), segment)

    w.loop(begin, end, block)
    w.ret_void()
    return w.function_


def _largest(w: Writer, a: Value, b: Value) -> Value:
    """Return the larger of each pair, or NaN if one is."""
    keep = w.or_(w.fcmp_ordered(">", a, b), w.fcmp_unordered("!=", a, a))
    return w.select(keep, a, b)


def _write_copy(module: ir.Module) -> ir.Function:
    """Write a function that copies a channel of the input into the grid, with its padding.

    Its parameters: the job, the channel in the input, and the channel in the grid.
    """
    w = Writer(module, "copy_plane", [POINTER, POINTER, POINTER])
    w.function_.attributes.add("noinline")
    pointer, source, target = w.arguments
    job = _Job(w, pointer)
    targets, sources, counts = (job.pointer(name) for name in ("row_target", "row_source", "row_count"))
    stride, size, rows = job.stride, job.grid_plane, job.grid_rows
    input_image, grid_image = job.plane_image, job.grid_image
    fill = w.bitcast(w.trunc(job.fill, I32), F32)
    evens = [2 * lane for lane in range(LANES // 2)] + [2 * lane + 1 for lane in range(LANES // 2, LANES)]

    def padding() -> None:
        fills, whole = w.spread(fill), w.sub(size, w.srem(size, integer(LANES)))
        w.loop(integer(0), whole, lambda i: w.put(fills, target, i), step=LANES)
        w.loop(whole, size, lambda i: w.put(fill, target, i))

    def image(b: Value) -> None:
        x, y = w.at(source, w.mul(b, input_image)), w.at(target, w.mul(b, grid_image))

        def row(r: Value) -> None:
            from_, to, count = w.at(x, w.index(sources, r)), w.at(y, w.index(targets, r)), w.index(counts, r)
            rest = w.srem(count, integer(LANES))
            whole = w.sub(count, rest)
            lanes = w.lanes(rest)

            def next_to_each_other() -> None:
                w.loop(integer(0), whole, lambda i: w.put(w.floats(from_, i), to, i), step=LANES)
                with w.if_then(w.icmp_signed("<", integer(0), rest)):
                    w.put_some(w.some_floats(from_, whole, w.mask(lanes)), to, whole, w.mask(lanes))

            def every_second() -> None:
                def sixteen(i: Value) -> None:
                    first = w.mul(i, integer(2))
                    low, high = w.floats(from_, first), w.floats(from_, w.add(first, integer(LANES - 1)))
                    w.put(w.shuffled(low, high, evens), to, i)

                w.loop(integer(0), whole, sixteen, step=LANES)
                with w.if_then(w.icmp_signed("<", integer(0), rest)):
                    read = w.lanes(w.sub(w.mul(rest, integer(2)), integer(1)))
                    first = w.mul(whole, integer(2))
                    low = w.some_floats(from_, first, w.mask(read))
                    high = w.some_floats(
                        from_, w.add(first, integer(LANES - 1)), w.mask(w.lshr(read, ir.Constant(I32, LANES - 1)))
                    )
                    w.put_some(w.shuffled(low, high, evens), to, whole, w.mask(lanes))

            def apart() -> None:
                w.loop(integer(0), count, lambda i: w.put(w.float_(from_, w.mul(i, stride)), to, i))

            w.choose(stride, {1: next_to_each_other, 2: every_second}, apart)

        w.loop(integer(0), rows, row)

    padding()
    w.loop(integer(0), job.plane_images, image)
    w.ret_void()
    return w.function_


def _write_transpose(module: ir.Module) -> ir.Function:
    """Write a function that transposes a matrix.

    Its parameters: the matrix, floats from a row to the next, the result, floats from a row to the next, the rows of the
    matrix and its columns.
    """
    w = Writer(module, "transpose", [POINTER, I64, POINTER, I64, I64, I64])
    w.function_.attributes.add("noinline")
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


def _write_worker(
    module: ir.Module,
    tiles: dict[tuple[int, int], ir.Function],
    copy: ir.Function,
    transpose: ir.Function,
    products: ir.Function,
    openmp: dict[str, ir.Function],
) -> ir.Function:
    """Write the function that each thread runs."""
    w = Writer(module, "worker", [POINTER])
    (pointer,) = w.arguments
    job = _Job(w, pointer)
    threaded = w.icmp_signed(">", job.threads, integer(1))
    before = w.block
    with w.if_then(threaded):
        mine = w.sext(w.call(openmp["omp_get_thread_num"], []), I64)
        all_ = w.sext(w.call(openmp["omp_get_num_threads"], []), I64)
        inside = w.block
    me, team = w.phi(I64), w.phi(I64)
    for phi, value, alone in ((me, mine, 0), (team, all_, 1)):
        phi.add_incoming(integer(alone), before)
        phi.add_incoming(value, inside)
    shares = job.shares
    starts = job.pointer("share_start")
    single_vector = w.icmp_signed("==", job.vectors, integer(0))
    with w.if_then(single_vector):
        begin = w.index(starts, w.sdiv(w.mul(shares, me), team))
        end = w.index(starts, w.sdiv(w.mul(shares, w.add(me, integer(1))), team))
        w.call(products, [pointer, begin, end])
        w.ret_void()
    pairs = w.mul(job.images, job.groups)
    apart = w.icmp_signed(">=", pairs, team)  # each thread has images or groups of its own
    scratch = w.at(job.pointer("scratch"), w.select(apart, w.mul(me, job.scratch_floats), integer(0)))
    number = w.select(apart, integer(0), me)
    count = w.select(apart, integer(1), team)
    first = w.select(apart, w.sdiv(w.mul(pairs, me), team), integer(0))
    last = w.select(apart, w.sdiv(w.mul(pairs, w.add(me, integer(1))), team), pairs)
    together = w.icmp_signed(">", count, integer(1))
    copies, groups = job.copies, job.groups
    channels, tokens = job.channels, job.tokens
    copied, of_tokens = (w.icmp_signed(">", value, integer(0)) for value in (copies, tokens))
    direct = w.not_(w.or_(copied, of_tokens))

    def wait() -> None:
        with w.if_then(together):
            w.call(openmp["GOMP_barrier"], [])

    def mine_of(n: Value) -> tuple[Value, Value]:
        return w.sdiv(w.mul(n, number), count), w.sdiv(w.mul(n, w.add(number, integer(1))), count)

    def pair(i: Value) -> None:
        image, group = w.sdiv(i, groups), w.srem(i, groups)
        x = w.at(job.pointer("input"), w.add(w.mul(image, job.input_image), w.mul(group, job.input_group)))
        output_at = w.mul(image, job.output_image)
        y, residual = (w.at(job.pointer(name), output_at) for name in ("output", "residual"))
        with w.if_then(copied):

            def plane(c: Value) -> None:
                source = w.at(x, w.mul(c, job.input_plane))
                w.call(copy, [pointer, source, w.at(scratch, w.mul(c, job.grid_plane))])

            w.loop(*mine_of(copies), plane)
            wait()
        with w.if_then(of_tokens):
            begin, end = mine_of(w.sdiv(w.add(channels, integer(LANES - 1)), integer(LANES)))
            begin, end = w.mul(begin, integer(LANES)), w.smaller(w.mul(end, integer(LANES)), channels)
            width = job.output_row
            source, target = w.at(x, begin), w.at(scratch, w.mul(begin, width))
            w.call(transpose, [source, channels, target, width, tokens, w.sub(end, begin)])
            wait()
        grid = w.select(direct, x, scratch)
        y = w.select(of_tokens, w.at(scratch, job.grid_floats), y)
        base = w.mul(group, job.group_blocks)
        w.choose(job.block_rows, {rows: functools.partial(items, rows, grid, y, residual, base) for rows in (0, 1, 4)})
        with w.if_then(of_tokens):
            wait()
            begin, end = mine_of(w.sdiv(w.add(job.output_rows, integer(LANES - 1)), integer(LANES)))
            begin, end = w.mul(begin, integer(LANES)), w.smaller(w.mul(end, integer(LANES)), job.output_rows)
            source = w.at(y, w.mul(begin, job.output_row))
            target = w.at(w.at(job.pointer("output"), output_at), begin)
            w.call(transpose, [source, job.output_row, target, job.output_rows, w.sub(end, begin), tokens])
        with w.if_then(w.not_(direct)):
            wait()  # before the grid is filled again

    def items(rows: int, grid: Value, y: Value, residual: Value, base: Value) -> None:
        size = TILE[max(1, rows)]
        tiles_ = w.sdiv(w.add(job.vectors, integer(size - 1)), integer(size))

        def item(j: Value) -> None:
            share, tile = w.sdiv(j, tiles_), w.srem(j, tiles_)
            first = w.mul(tile, integer(size))
            begin = w.add(base, w.index(starts, share))
            end = w.add(base, w.index(starts, w.add(share, integer(1))))
            plain = w.index(job.pointer("plain"), tile)
            width = w.smaller(integer(size), w.sub(job.vectors, first))
            arguments = [pointer, grid, y, residual, first, plain, begin, end]
            w.choose(width, {n: functools.partial(w.call, tiles[rows, n], arguments) for n in range(1, size + 1)})

        w.loop(*mine_of(w.mul(tiles_, shares)), item)

    w.loop(first, last, pair)
    w.ret_void()
    return w.function_


def _write_products(module: ir.Module) -> ir.Function:
    """Write a function that multiplies the matrix by one vector: each output is one position.

    Its parameters: the job, the first row and the last.
    """
    w = Writer(module, "products", [POINTER, I64, I64])
    pointer, begin, end = w.arguments
    job = _Job(w, pointer)
    x, y = job.pointer("input"), job.pointer("output")
    offsets, values, starts, bias = (job.pointer(name) for name in ("offsets", "values", "block_start", "bias"))
    zero = ir.Constant(F32, 0.0)
    epilogue = _Epilogue(w, job)
    parallel = 8  # sums at once, because a sum waits for the one before

    def row(i: Value) -> None:
        first, last = w.index(starts, i), w.index(starts, w.add(i, integer(1)))
        whole = w.sub(last, w.srem(w.sub(last, first), integer(parallel)))

        def product(p: Value, sum_: Value) -> Value:
            return w.multiply_add(w.float_(values, p), w.float_(x, w.index(offsets, p)), sum_)

        sums = w.loop(
            first,
            whole,
            lambda p, *sums: [product(w.add(p, integer(k)), s) for k, s in enumerate(sums)],
            [zero] * parallel,
            step=parallel,
        )
        while len(sums) > 1:
            sums = [w.fadd(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
        (total,) = w.loop(whole, last, lambda p, s: [product(p, s)], sums)
        (result,) = epilogue([w.spread(w.fadd(total, w.float_(bias, i)))])
        w.put(w.extract_element(result, ir.Constant(I32, 0)), y, i)

    w.loop(begin, end, row)
    w.ret_void()
    return w.function_


OPENMP = {
    "omp_get_thread_num": ir.FunctionType(I32, []),
    "omp_get_num_threads": ir.FunctionType(I32, []),
    "GOMP_barrier": ir.FunctionType(VOID, []),
    "GOMP_parallel": ir.FunctionType(VOID, [POINTER, POINTER, I32, I32]),
}


def module() -> ir.Module:
    """Return the kernel in LLVM's intermediate representation."""
    module = ir.Module("feather_param")
    openmp = {name: ir.Function(module, kind, name) for name, kind in OPENMP.items()}
    _write_smooth(module)
    tiles = {
        (rows, width): _write_tile(module, rows, width)
        for rows in (0, 1, 4)
        for width in range(1, TILE[max(1, rows)] + 1)
    }
    worker = _write_worker(
        module, tiles, _write_copy(module), _write_transpose(module), _write_products(module), openmp
    )
    for function in module.functions:
        if not function.is_declaration and function.name != "run":
            function.linkage = "internal"
    w = Writer(module, "run", [POINTER])
    (pointer,) = w.arguments
    threads = _Job(w, pointer).threads
    with w.if_else(w.icmp_signed(">", threads, integer(1))) as (several, one):
        with several:
            w.call(openmp["GOMP_parallel"], [worker, pointer, w.trunc(threads, I32), ir.Constant(I32, 0)])
        with one:
            w.call(worker, [pointer])
    w.ret_void()
    return module


class Kernel:
    def __init__(self) -> None:
        library = ctypes.CDLL(torch._C.__file__)
        for name in OPENMP:
            binding.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
        self.code = MachineCode(module())
        self.run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.code.address("run"))


@functools.cache
def compiled() -> Kernel:
    return Kernel()

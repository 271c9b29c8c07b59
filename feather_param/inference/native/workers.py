"""Machine code of what each thread runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from feather_param.inference.job import LANES, Activation
from feather_param.inference.native import tile
from feather_param.inference.native.activations import activated
from feather_param.inference.native.copying import write_copy
from feather_param.inference.native.transposing import write_transpose
from feather_param.inference.native.writer import F32, I32, I64, POINTER, VOID, Job, Value, Writer, integer

_PARALLEL = 8  # sums at once in a product, because a sum waits for the one before


@dataclass(frozen=True)
class Worker:
    """What the code of a thread depends on."""

    kind: str  # "convolution", "tokens" or "product"
    threads: bool  # several threads, through OpenMP
    activation: Activation = Activation.IDENTITY  # of a product

    def module(self) -> ir.Module:
        """Return a module with the code, in a function named "worker" whose parameter is the job."""
        module = ir.Module("worker")
        writer = {"convolution": _Convolution, "tokens": _Tokens, "product": _Product}[self.kind]
        writer(module, self).write()
        return module


class _Team(Writer):
    """The function of a thread: it knows its number and how many threads there are."""

    def __init__(self, module: ir.Module, worker: Worker) -> None:
        super().__init__(module, "worker", [POINTER])
        self._worker = worker
        self._job = Job(self)
        self._me, self._team = integer(0), integer(1)
        if worker.threads:
            number = self._openmp("omp_get_thread_num", I32)
            count = self._openmp("omp_get_num_threads", I32)
            self._me, self._team = self.sext(self.call(number, []), I64), self.sext(self.call(count, []), I64)
            self._barrier = self._openmp("GOMP_barrier", VOID)
        self._number, self._count = self._me, self._team  # of the threads that share a grid

    def _openmp(self, name: str, result: ir.Type) -> ir.Function:
        return ir.Function(self.function_.module, ir.FunctionType(result, []), name)

    def _wait(self) -> None:
        """Wait for the other threads that share the grid."""
        if self._worker.threads:
            with self.if_then(self.icmp_signed(">", self._count, integer(1))):
                self.call(self._barrier, [])

    def _part(self, n: Value, number: Value, count: Value) -> tuple[Value, Value]:
        """Return the begin and end of a thread's part of n items."""
        return self.sdiv(self.mul(n, number), count), self.sdiv(self.mul(n, self.add(number, integer(1))), count)

    def _mine(self, n: Value) -> tuple[Value, Value]:
        """Return the begin and end of this thread's part of n items of a grid."""
        return self._part(n, self._number, self._count)

    def _each(self, pairs: Value, body: Callable[[Value, Value], None]) -> None:
        """Write a loop over pairs of an image and a group, with the address of the grid.

        If there are at least as many pairs as threads, each thread has pairs and a grid of its own. Otherwise all
        threads share each pair.
        """
        apart = self.icmp_signed(">=", pairs, self._team)
        me, team, job = self._me, self._team, self._job
        floats = self.select(apart, self.mul(me, job.scratch_floats), integer(0))
        scratch = self.at(job.pointer("scratch"), floats)
        begin, end = self._part(pairs, me, team)
        begin, end = self.select(apart, begin, integer(0)), self.select(apart, end, pairs)
        self._number = self.select(apart, integer(0), me)
        self._count = self.select(apart, integer(1), team)
        self.loop(begin, end, lambda i: body(i, scratch))

    def _tiles(self, grid: Value, output: Value, residual: Value, base: Value) -> None:
        """Write a loop over this thread's tiles, from a block of the matrix on."""
        job = self._job
        size, vectors, shares = job.tile_vectors, job.vectors, job.shares
        tiles = self.sdiv(self.sub(self.add(vectors, size), integer(1)), size)
        last = self.sub(tiles, integer(1))
        starts, kind = job.pointer("share_start"), tile.SIGNATURE.as_pointer()
        whole, rest = (self.inttoptr(value, kind) for value in (job.tile, job.last_tile))
        sums = self.at(job.pointer("scratch"), self.add(job.sums, self.mul(self._me, job.sums_floats)))
        first, end = self._mine(self.mul(tiles, shares))

        def share(number: Value) -> None:
            before = self.mul(number, tiles)
            low, high = self.larger(self.sub(first, before), integer(0)), self.smaller(self.sub(end, before), tiles)
            blocks = [self.add(base, self.index(starts, self.add(number, integer(n)))) for n in range(2)]
            self.call(whole, [job.address, grid, output, residual, low, self.smaller(high, last), *blocks, sums])
            with self.if_then(self.icmp_signed("==", high, tiles)):
                begin = self.larger(low, last)
                self.call(rest, [job.address, grid, output, residual, begin, high, *blocks, sums])

        begin, after = self.sdiv(first, tiles), self.sdiv(self.sub(self.add(end, tiles), integer(1)), tiles)
        self.loop(begin, after, share)


class _Convolution(_Team):
    """Fills the grid of each pair, if there is one, and computes its tiles."""

    def write(self) -> None:
        job, copy = self._job, write_copy(self.function_.module)
        planes, groups = job.planes, job.groups
        copied = self.icmp_signed(">", planes, integer(0))

        def pair(i: Value, scratch: Value) -> None:
            image, group = self.sdiv(i, groups), self.srem(i, groups)
            floats = self.add(self.mul(image, job.input_image), self.mul(group, job.input_group))
            x = self.at(job.pointer("input"), floats)

            def plane(c: Value) -> None:
                source, target = self.at(x, self.mul(c, job.input_plane)), self.mul(c, job.grid_plane)
                self.call(copy, [job.address, source, self.at(scratch, target)])

            with self.if_then(copied):
                self.loop(*self._mine(planes), plane)
                self._wait()
            output = self.mul(image, job.output_image)
            y, residual = (self.at(job.pointer(name), output) for name in ("output", "residual"))
            self._tiles(self.select(copied, scratch, x), y, residual, self.mul(group, job.group_blocks))
            with self.if_then(copied):
                self._wait()  # before the grid is filled again

        self._each(self.mul(job.images, groups), pair)
        self.ret_void()


class _Tokens(_Team):
    """Multiplies the matrix with tokens: transposes them, computes tiles, and transposes the result."""

    def write(self) -> None:
        job, transpose = self._job, write_transpose(self.function_.module)
        channels, tokens, rows, width = job.channels, job.tokens, job.output_rows, job.output_row

        def image(i: Value, scratch: Value) -> None:
            x = self.at(job.pointer("input"), self.mul(i, job.input_image))
            y = self.at(job.pointer("output"), self.mul(i, job.output_image))
            result = self.at(scratch, job.token_grid)
            begin, end = self._lines(channels)
            target = self.at(scratch, self.mul(begin, width))
            self.call(transpose, [self.at(x, begin), channels, target, width, tokens, self.sub(end, begin)])
            self._wait()
            self._tiles(scratch, result, ir.Constant(POINTER, None), integer(0))
            self._wait()
            begin, end = self._lines(rows)
            source = self.at(result, self.mul(begin, width))
            self.call(transpose, [source, width, self.at(y, begin), rows, self.sub(end, begin), tokens])
            self._wait()

        self._each(job.images, image)
        self.ret_void()

    def _lines(self, n: Value) -> tuple[Value, Value]:
        """Return the begin and end of this thread's part of n lines, in multiples of a vector."""
        begin, end = self._mine(self.sdiv(self.add(n, integer(LANES - 1)), integer(LANES)))
        return self.mul(begin, integer(LANES)), self.smaller(self.mul(end, integer(LANES)), n)


class _Product(_Team):
    """Multiplies the matrix with one token. Each output is one sum."""

    def write(self) -> None:
        job = self._job
        x, y = job.pointer("input"), job.pointer("output")
        starts, bias, shares = job.pointer("block_start"), job.pointer("bias"), job.pointer("share_start")
        offsets, values = job.pointer("offsets"), job.pointer("values")
        zero = ir.Constant(F32, 0.0)

        def product(p: Value, sum_: Value) -> Value:
            return self.multiply_add(self.float_(values, p), self.float_(x, self.index(offsets, p)), sum_)

        def several(p: Value, *sums: Value) -> list[Value]:
            return [product(self.add(p, integer(k)), s) for k, s in enumerate(sums)]

        def row(i: Value) -> None:
            first, last = self.index(starts, i), self.index(starts, self.add(i, integer(1)))
            whole = self.sub(last, self.srem(self.sub(last, first), integer(_PARALLEL)))
            sums = self.loop(first, whole, several, [zero] * _PARALLEL, step=_PARALLEL)
            while len(sums) > 1:
                sums = [self.fadd(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
            (total,) = self.loop(whole, last, lambda p, s: [product(p, s)], sums)
            result = activated(self, self.spread(self.fadd(total, self.float_(bias, i))), self._worker.activation)
            self.put(self.extract_element(result, ir.Constant(I32, 0)), y, i)

        begin, end = self._mine(job.shares)
        self.loop(self.index(shares, begin), self.index(shares, end), row)
        self.ret_void()

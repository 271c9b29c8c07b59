"""Machine code of what each thread runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from feather_param.inference.engine import tile
from feather_param.inference.engine.activations import activated
from feather_param.inference.engine.copying import write_copy
from feather_param.inference.engine.job import LANES, Activation
from feather_param.inference.engine.transposing import write_transpose
from feather_param.inference.engine.writer import F32, I1, I32, I64, POINTER, VOID, Job, Value, Writer, integer

_FEW = 4  # threads that each fill a grid
_PARALLEL = 8  # sums at once in a product, because a sum waits for the one before


@dataclass(frozen=True)
class Worker:
    """What the code of a thread depends on."""

    kind: str  # "convolution", "tokens" or "product"
    threads: bool  # several threads, through OpenMP
    activation: Activation = Activation.IDENTITY  # of a product
    rows: int = 1  # of a block of the matrix, for a product

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
        # While the code of a pair is written: this thread's number among those that compute it, their count, and
        # whether they share a grid.
        self._number, self._count = self._me, self._team
        self._sharing: Value = ir.Constant(I1, 0)

    def _openmp(self, name: str, result: ir.Type) -> ir.Function:
        return ir.Function(self.function_.module, ir.FunctionType(result, []), name)

    def _wait(self) -> None:
        """Wait for the other threads that share the grid."""
        if self._worker.threads:
            with self.if_then(self._sharing):
                self.call(self._barrier, [])

    def _part(self, n: Value, number: Value, count: Value) -> tuple[Value, Value]:
        """Return the begin and end of a thread's part of n items."""
        if not self._worker.threads:  # without the divisions, which take longer than a small tile
            return integer(0), n
        return self.sdiv(self.mul(n, number), count), self.sdiv(self.mul(n, self.add(number, integer(1))), count)

    def _mine(self, n: Value) -> tuple[Value, Value]:
        """Return the begin and end of this thread's part of n items of a grid."""
        return self._part(n, self._number, self._count)

    def _each(self, pairs: Value, body: Callable[[Value, Value], None], alone: int) -> None:
        """Write a loop over pairs of an image and a group, with the address of the grid.

        Each thread computes as many pairs as the others. All threads share each of the remaining pairs. Few threads
        fill a grid of their own for such a pair, because to fetch it from another processor takes longer.

        Args:
            pairs: their number.
            body: writes the code of a pair.
            alone: most threads that fill grids of their own for a shared pair.
        """
        me, team, job = self._me, self._team, self._job
        memory, floats = job.pointer("scratch"), job.scratch_floats
        if not self._worker.threads:
            self.loop(integer(0), pairs, lambda i: body(i, memory))
            return
        rounds = self.sdiv(pairs, team)
        several = self.icmp_signed(">", team, integer(alone))

        def one(k: Value) -> None:
            shared = self.icmp_signed(">=", k, rounds)
            first = self.mul(rounds, self.select(shared, self.sub(team, integer(1)), me))
            self._number = self.select(shared, me, integer(0))
            self._count = self.select(shared, team, integer(1))
            self._sharing = self.and_(shared, several)
            begin = self.select(self._sharing, integer(0), self.mul(me, floats))
            body(self.add(first, k), self.at(memory, begin))

        self.loop(integer(0), self.add(rounds, self.srem(pairs, team)), one)

    def _tiles(self, grid: Value, output: Value, residual: Value, base: Value) -> None:
        """Write a loop over this thread's tiles, from a block of the matrix on."""
        job = self._job
        tiles, shares = job.tiles, job.shares
        starts, kind = job.pointer("share_start"), tile.SIGNATURE.as_pointer()
        whole, rest = (self.inttoptr(value, kind) for value in (job.tile, job.last_tile))
        sums = self.at(job.pointer("scratch"), self.add(job.sums, self.mul(self._me, job.sums_floats)))
        first, end = self._mine(self.mul(tiles, shares))
        last = self.sub(tiles, integer(1))

        def share(number: Value) -> None:
            before = self.mul(number, tiles)
            low, high = self.larger(self.sub(first, before), integer(0)), self.smaller(self.sub(end, before), tiles)
            blocks = [self.add(base, self.index(starts, self.add(number, integer(n)))) for n in range(2)]
            for code, begin, after in ((whole, low, self.smaller(high, last)), (rest, self.larger(low, last), high)):
                with self.if_then(self.icmp_signed("<", begin, after)):
                    self.call(code, [job.address, grid, output, residual, begin, after, *blocks, sums])

        if self._worker.threads:
            begin, after = self.sdiv(first, tiles), self.sdiv(self.add(end, last), tiles)
        else:
            begin, after = integer(0), shares
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
                self._wait()  # until nobody reads the grid
                number = self.select(self._sharing, self._number, integer(0))
                self.loop(*self._part(planes, number, self.select(self._sharing, self._count, integer(1))), plane)
                self._wait()
            output = self.mul(image, job.output_image)
            y, residual = (self.at(job.pointer(name), output) for name in ("output", "residual"))
            self._tiles(self.select(copied, scratch, x), y, residual, self.mul(group, job.group_blocks))

        self._each(self.mul(job.images, groups), pair, _FEW)
        self.ret_void()


class _Tokens(_Team):
    """Multiplies the matrix with tokens: transposes them, computes tiles, and transposes the result."""

    def write(self) -> None:
        job, transpose = self._job, write_transpose(self.function_.module)
        channels, tokens, rows, width = job.channels, job.tokens, job.out_channels, job.output_row

        def image(i: Value, scratch: Value) -> None:
            x = self.at(job.pointer("input"), self.mul(i, job.input_image))
            y = self.at(job.pointer("output"), self.mul(i, job.output_image))
            result = self.at(scratch, job.token_grid)
            self._wait()  # until nobody reads the grid
            begin, end = self._lines(channels)
            target = self.at(scratch, self.mul(begin, width))
            self.call(transpose, [self.at(x, begin), channels, target, width, tokens, self.sub(end, begin)])
            self._wait()
            self._tiles(scratch, result, ir.Constant(POINTER, None), integer(0))
            self._wait()
            begin, end = self._lines(rows)
            source = self.at(result, self.mul(begin, width))
            self.call(transpose, [source, width, self.at(y, begin), rows, self.sub(end, begin), tokens])

        self._each(job.images, image, 1)
        self.ret_void()

    def _lines(self, n: Value) -> tuple[Value, Value]:
        """Return the begin and end of this thread's part of n lines, in multiples of a vector."""
        begin, end = self._mine(self.sdiv(self.add(n, integer(LANES - 1)), integer(LANES)))
        return self.mul(begin, integer(LANES)), self.smaller(self.mul(end, integer(LANES)), n)


class _Product(_Team):
    """Multiplies the matrix with one token. Each block of rows is one sum, a vector with a float for each row."""

    def write(self) -> None:
        job, rows = self._job, self._worker.rows
        x, y = job.pointer("input"), job.pointer("output")
        starts, bias, shares = job.pointer("block_start"), job.pointer("bias"), job.pointer("share_start")
        offsets, values = job.pointer("offsets"), job.pointer("values")
        column = ir.VectorType(F32, rows)
        zero = ir.Constant(column, [0.0] * rows)

        def of_rows(pointer: Value, i: Value) -> Value:
            return self.load(self.at(pointer, i, column), align=4, typ=column)

        def product(p: Value, sum_: Value) -> Value:
            return self.multiply_add(
                of_rows(values, p), self.spread(self.float_(x, self.index(offsets, p)), rows), sum_
            )

        def several(p: Value, *sums: Value) -> list[Value]:
            return [product(self.add(p, integer(k)), s) for k, s in enumerate(sums)]

        def block(i: Value) -> None:
            first, last = self.index(starts, i), self.index(starts, self.add(i, integer(1)))
            whole = self.sub(last, self.srem(self.sub(last, first), integer(_PARALLEL)))
            sums = self.loop(first, whole, several, [zero] * _PARALLEL, step=_PARALLEL)
            while len(sums) > 1:
                sums = [self.fadd(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
            (total,) = self.loop(whole, last, lambda p, s: [product(p, s)], sums)
            total = self.fadd(total, of_rows(bias, i))
            result = activated(
                self, self.shuffled(total, total, [k % rows for k in range(LANES)]), self._worker.activation
            )
            self.store(self.shuffled(result, result, range(rows)), self.at(y, i, column), align=4)

        begin, end = self._mine(job.shares)
        self.loop(self.index(shares, begin), self.index(shares, end), block)
        self.ret_void()

"""Machine code of tiles: some vectors of outputs, for blocks of output channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from feather_param.inference.engine.activations import activated
from feather_param.inference.engine.job import LANES, Activation
from feather_param.inference.engine.writer import I32, I64, POINTER, VECTOR, VOID, Job, Value, Writer, integer, vector

SIGNATURE = ir.FunctionType(VOID, [POINTER, POINTER, POINTER, POINTER, I64, I64, I64, I64, POINTER])
"""Of the code: the job, the grid, the output and the residual of the image, the first tile and the last, the first
block and the last, and memory for the sums between two parts."""


@dataclass(frozen=True)
class Tile:
    """What the code of a tile depends on."""

    rows: int  # in a block; 0: the largest of the elements in the window, instead of sums
    width: int  # vectors
    activation: Activation
    residual: bool

    def module(self) -> ir.Module:
        """Return a module with the code of the tile, in a function named "tile"."""
        module = ir.Module("tile")
        _TileWriter(module, self).write()
        return module


class _TileWriter(Writer):
    """Writes the code of a tile."""

    def __init__(self, module: ir.Module, tile: Tile) -> None:
        super().__init__(module, "tile", SIGNATURE.args)
        self._tile = tile
        self._height = max(1, tile.rows)
        _, self._grid, self._output, self._residual = self.arguments[:4]
        self._begin, self._end, self._sums = self.arguments[-3:]
        self._job = Job(self)
        # Of the tile whose code is being written: its first vector, the index of its first output, and the positions.
        self._first, self._plain = integer(0), integer(0)
        self._positions: list[Value] = []

    def write(self) -> None:
        """Write the function: loops over tiles, parts and blocks."""
        job, pointer = self._job, self._job.pointer
        self._position, self._plains = pointer("position"), pointer("plain")
        self._offsets, self._values, self._bias = pointer("offsets"), pointer("values"), pointer("bias")
        self._segments, self._outputs = pointer("segment_start"), pointer("segment_output")
        self._lanes, self._row_size = pointer("segment_lanes"), job.output_row
        starts, part_starts, parts, size = pointer("block_start"), job.part_starts, job.parts, job.tile_vectors
        final = self.sub(parts, integer(1))

        def tile(number: Value) -> None:
            self._first, self._plain = self.mul(number, size), self.index(self._plains, number)
            vectors = [self.add(self._first, integer(t)) for t in range(self._tile.width)]
            self._positions = [self.at(self._grid, self.index(self._position, vector)) for vector in vectors]
            self.loop(integer(0), parts, part)

        def part(number: Value) -> None:
            is_first, is_final = (self.icmp_signed("==", number, value) for value in (integer(0), final))
            begin = self.at(starts, self.mul(number, part_starts), I32)
            self.loop(self._begin, self._end, lambda i: self._write_block(i, begin, is_first, is_final))

        self.loop(self.arguments[4], self.arguments[5], tile)
        self.ret_void()

    def _write_block(self, block: Value, starts: Value, first: Value, final: Value) -> None:
        """Write code that adds a part of the block's weights; the final part is stored in the output."""
        width, height = self._tile.width, self._height
        row = self.mul(block, integer(height))
        size = integer(height * width * LANES)
        memory = self.at(self._sums, self.mul(self.sub(block, self._begin), size))
        before = self._sums_before(row, memory, first)
        begin, end = self.index(starts, block), self.index(starts, self.add(block, integer(1)))
        sums = self.loop(begin, end, self._add, before)
        with self.if_else(final) as (finished, unfinished):
            with finished:
                for r in range(height):
                    at = self.mul(self.add(row, integer(r)), self._row_size)
                    self._store(at, sums[r * width : (r + 1) * width])
            with unfinished:
                for j, value in enumerate(sums):
                    self.put(value, memory, integer(LANES * j))

    def _sums_before(self, row: Value, memory: Value, first: Value) -> list[Value]:
        """Write code that returns the sums before a part: the bias, or what the part before left."""
        width, height = self._tile.width, self._height
        if not self._tile.rows:
            return [vector(float("-inf"))] * width
        with self.if_else(first) as (begins, goes_on):
            with begins:
                bias = [self.spread(self.float_(self._bias, self.add(row, integer(r)))) for r in range(height)]
                block = self.block
            with goes_on:
                sums = [self.floats(memory, integer(LANES * j)) for j in range(height * width)]
                other = self.block
        return [self.either(VECTOR, (bias[j // width], block), (value, other)) for j, value in enumerate(sums)]

    def _add(self, p: Value, *sums: Value) -> list[Value]:
        """Write code that adds a weight times the vectors of inputs at its offset to the sums."""
        width, height = self._tile.width, self._height
        offset = self.index(self._offsets, p)
        x = [self.floats(position, offset) for position in self._positions]
        if not self._tile.rows:
            return [self._larger(a, b) for a, b in zip(x, sums, strict=True)]
        at = self.mul(p, integer(height))
        weights = [self.spread(self.float_(self._values, self.add(at, integer(r)))) for r in range(height)]
        return [self.multiply_add(weights[j // width], x[j % width], s) for j, s in enumerate(sums)]

    def _larger(self, a: Value, b: Value) -> Value:
        """Return the larger of each pair, or NaN if one is."""
        keep = self.or_(self.fcmp_ordered(">", a, b), self.fcmp_unordered("uno", a, a))
        return self.select(keep, a, b)

    def _store(self, at: Value, sums: Sequence[Value]) -> None:
        """Write code that stores the outputs of a row."""
        with self.if_else(self.icmp_signed(">=", self._plain, integer(0))) as (contiguous, scattered):
            with contiguous:
                begin = self.add(at, self._plain)
                for t, value in enumerate(sums):
                    place = self.add(begin, integer(LANES * t))
                    if self._tile.residual:
                        value = self.fadd(value, self.floats(self._residual, place))
                    self.put(activated(self, value, self._tile.activation), self._output, place)
            with scattered:
                for t, value in enumerate(sums):
                    self._store_segments(at, self.add(self._first, integer(t)), value)

    def _store_segments(self, at: Value, which: Value, value: Value) -> None:
        """Write code that stores the lanes of a vector that are outputs."""
        if not self._tile.residual:
            value = activated(self, value, self._tile.activation)

        def segment(s: Value) -> None:
            place = self.add(at, self.index(self._outputs, s))
            mask = self.mask(self.load(self.at(self._lanes, s, I32), typ=I32))
            total = value
            if self._tile.residual:
                total = self.fadd(value, self.some_floats(self._residual, place, mask, vector(0.0)))
                total = activated(self, total, self._tile.activation)
            self.put_some(total, self._output, place, mask)

        first, last = self.index(self._segments, which), self.index(self._segments, self.add(which, integer(1)))
        self.loop(first, last, segment)

"""Machine code of a tile: some vectors of outputs, for blocks of output channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from feather_param.inference.job import LANES, Activation
from feather_param.inference.native.activations import activated
from feather_param.inference.native.writer import I32, I64, POINTER, VOID, Job, Value, Writer, integer, vector

SIGNATURE = ir.FunctionType(VOID, [POINTER, POINTER, POINTER, POINTER, I64, I64, I64, I64])
"""Of a tile: the job, the grid, the output and the residual of the image, the first vector, the index of the first
contiguous output (or -1), the first block and the last."""


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
        _, self._grid, self._output, self._residual, self._first, self._plain, self._begin, self._end = self.arguments
        self._job = Job(self)

    def write(self) -> None:
        width, pointer = self._tile.width, self._job.pointer
        vectors = [self.add(self._first, integer(t)) for t in range(width)]
        self._positions = [self.at(self._grid, self.index(pointer("position"), vector)) for vector in vectors]
        self._starts, self._offsets, self._values = pointer("block_start"), pointer("offsets"), pointer("values")
        self._bias, row_size = pointer("bias"), self._job.output_row
        segments, outputs, lanes = pointer("segment_start"), pointer("segment_output"), pointer("segment_lanes")

        def block(i: Value) -> None:
            row = self.mul(i, integer(self._height))
            sums = self._sums(i, row)
            for r in range(self._height):
                at = self.mul(self.add(row, integer(r)), row_size)
                self._store(at, sums[r * width : (r + 1) * width])

        self._segments, self._outputs, self._lanes = segments, outputs, lanes
        self.loop(self._begin, self._end, block)
        self.ret_void()

    def _sums(self, block: Value, row: Value) -> list[Value]:
        """Write code that returns the sums of the block's rows, one row after the other."""
        width, height = self._tile.width, self._height
        if self._tile.rows:
            bias = [self.spread(self.float_(self._bias, self.add(row, integer(r)))) for r in range(height)]
            sums = [bias[r] for r in range(height) for _ in range(width)]
        else:
            sums = [vector(float("-inf"))] * width

        def add(p: Value, *sums: Value) -> list[Value]:
            offset = self.index(self._offsets, p)
            x = [self.floats(position, offset) for position in self._positions]
            if not self._tile.rows:
                return [self._larger(a, b) for a, b in zip(x, sums, strict=True)]
            at = self.mul(p, integer(height))
            weights = [self.spread(self.float_(self._values, self.add(at, integer(r)))) for r in range(height)]
            return [self.multiply_add(weights[j // width], x[j % width], s) for j, s in enumerate(sums)]

        first, last = self.index(self._starts, block), self.index(self._starts, self.add(block, integer(1)))
        return self.loop(first, last, add, sums)

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

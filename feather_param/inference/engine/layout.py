"""Where the kernel finds the inputs of a convolution and puts the outputs, for one shape of the input.

See Note [A convolution is a sum of shifted rows] in `kernel.py`. Indices are int32 in the kernel, so that the grid of a
group, and the output of the images that share it, have at most 2**31 floats.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feather_param.inference.engine.job import LANES

_WAY = 512  # floats: channels this far apart share few places in a cache

Sizes = tuple[int, ...]
_Int32 = NDArray[np.int32]
_Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Geometry:
    """The sizes of a convolution. All tuples have one number for each dimension of an image."""

    channels: int  # of the input, in each group
    out_channels: int  # of all groups
    groups: int
    kernel_size: Sizes
    stride: Sizes
    dilation: Sizes
    before: Sizes  # zeros that are padded before and after the image
    after: Sizes

    def output_sizes(self, sizes: Sizes) -> Sizes:
        """Return the sizes of the output for those of the input.

        Raises:
            ValueError: the padded input is smaller than the window.
        """
        spans = tuple(d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True))
        padded = tuple(a + n + b for a, n, b in zip(self.before, sizes, self.after, strict=True))
        if any(n < span for n, span in zip(padded, spans, strict=True)):
            raise ValueError(f"expected a padded input of at least the window's size {spans}, got {padded}")
        return tuple((n - span) // s + 1 for n, span, s in zip(padded, spans, self.stride, strict=True))


@dataclass(frozen=True)
class Grid:
    """The memory into which a channel of some images is copied: [phases, images, *sizes of a phase], and a gap.

    A window of stride s moves by s pixels. The pixels are therefore grouped into phases: those of equal index modulo s,
    in each dimension. In a phase, the window moves by one pixel.
    """

    plane: int  # floats of a channel, with the gap
    # Of each row of an image: the index of its first element in the grid and in the input, and the number of elements.
    # What follows a row in the grid is padding. The last target is the end of the channel.
    target: _Int32
    source: _Int32
    count: _Int32


@dataclass(frozen=True)
class Layout:
    """The tables of the kernel for one shape of the input."""

    channels: int  # of a group's input
    out: Sizes  # sizes of the output
    images: int  # in a grid
    grid: Grid | None  # None: the input itself is used
    offsets: _Int32  # of each column of the matrix, from the position
    position: _Int32  # of each vector: of lane 0
    segment_start: _Int32
    segment_output: _Int32
    segment_lanes: _Int32

    def plain(self, tile: int) -> _Int32:
        """Return, for each tile, the index of its first output if all its lanes are contiguous outputs, or else -1."""
        vectors = len(self.position)
        tiles = -(-vectors // tile)
        first = self.segment_output[self.segment_start[:-1]]
        whole = (np.diff(self.segment_start) == 1) & (self.segment_lanes[self.segment_start[:-1]] == 2**LANES - 1)
        joined = np.append(False, np.diff(first) == LANES)  # with the vector before
        joined[::tile] = True
        good = np.append(whole & joined, np.ones(tiles * tile - vectors, bool)).reshape(tiles, tile).all(1)
        return np.where(good, first[::tile], -1).astype(np.int32)

    def footprint(self, tile: int) -> int:
        """Return the bytes of a channel that a tile of some vectors reads, in whole cache lines."""
        window = self.offsets[: len(self.offsets) // self.channels].astype(np.int64)
        lines = (window[:, None] + LANES * np.arange(tile + (1 if self.grid else 0))) // LANES
        return 4 * LANES * len(np.unique(lines))


@functools.lru_cache(maxsize=1024)
def layout(geometry: Geometry, batch: int, sizes: Sizes) -> Layout:
    """Return the layout for images of some sizes. A grid has several small images, so that they fill the vectors.

    Args:
        geometry: of the convolution.
        batch: images, at least one; a grid has at most so many.
        sizes: of an image.

    Raises:
        ValueError: the padded input is smaller than the window, or an image is too large for the kernel.
    """
    out = geometry.output_sizes(sizes)
    channels, pixels, outputs = geometry.channels, math.prod(sizes), math.prod(out)
    per_image = -(-outputs // LANES)
    images = min(batch, 1 if per_image >= 4 else -(-8 // per_image))
    _require_small(max(channels * geometry.groups * pixels, geometry.out_channels * outputs) * images, sizes)
    moves = {*geometry.kernel_size, *geometry.stride} != {1} or any(geometry.before + geometry.after)
    if not moves and pixels % LANES == 0 and (channels < 32 or pixels % _WAY):
        position = np.arange(0, pixels, LANES, dtype=np.int32)
        offsets = (np.arange(channels) * pixels).astype(np.int32)
        return Layout(channels, out, 1, None, offsets, position, *_contiguous(position))
    grid, window, rows = _grid(geometry, sizes, out, images)
    _require_small(channels * grid.plane, sizes)
    offsets = (np.arange(channels)[:, None] * grid.plane + window).reshape(-1).astype(np.int32)
    first = np.arange(images)[:, None] * (geometry.out_channels * outputs) + np.arange(0, outputs, out[-1])
    return Layout(channels, out, images, grid, offsets, *_vectors(rows, first.reshape(-1), out[-1]))


def _require_small(floats: int, sizes: Sizes) -> None:
    if floats >= 2**31:
        raise ValueError(f"expected an image of fewer than 2**31 floats, got one of size {sizes}; use smaller images")


def _grid(geometry: Geometry, sizes: Sizes, out: Sizes, images: int) -> tuple[Grid, _Int64, _Int64]:
    """Return the grid, the offset of each place in the window, and the positions of the first output of each row."""
    g = geometry
    extents = tuple(n + d * (k - 1) // s for n, k, s, d in zip(out, g.kernel_size, g.stride, g.dilation, strict=True))
    steps = [math.prod(extents[i + 1 :]) for i in range(len(extents))]
    inner = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    taps = [[d * i for i in range(k)] for k, d in zip(g.kernel_size, g.dilation, strict=True)]
    remainders = [sorted({tap % s for tap in some}) for some, s in zip(taps, g.stride, strict=True)]
    phases = {phase: i for i, phase in enumerate(itertools.product(*remainders))}
    size = math.prod(extents)
    end = len(phases) * images * size
    plane = -(-end // LANES) * LANES + LANES  # the gap takes what vectors read and write beyond the end
    _require_small(plane, sizes)
    table = []  # targets, sources and counts of the rows of an image, in each phase
    for phase, i in phases.items():
        low, pad, s = phase[-1], g.before[-1], g.stride[-1]
        begin = max(0, -((low - pad) // s))  # first element of the row that is not padding
        first = low - pad + s * begin
        count = max(0, min(len(range(first, sizes[-1], s)), extents[-1] - begin))
        for index in itertools.product(*map(range, extents[:-1])):
            outer = zip(index, g.stride[:-1], phase[:-1], g.before[:-1], strict=True)
            at = [j * s + low - pad for j, s, low, pad in outer]
            if count and all(0 <= a < n for a, n in zip(at, sizes[:-1], strict=True)):
                table.append((i * size * images + _dot(index, steps) + begin, _dot(at, inner) + first, count))
    one = np.array(table, np.int64).reshape(-1, 3)
    number = np.arange(images)[:, None]
    target = (one[:, 0] + number * size).reshape(-1)
    source = (one[:, 1] + number * (g.channels * g.groups * math.prod(sizes))).reshape(-1)
    order = np.argsort(target)
    rows = _joined(target[order], source[order], np.tile(one[:, 2], images)[order], g.stride[-1])
    # A row without elements comes first, for the padding before the others.
    rows = np.append(0, [*rows[0], end]), np.append(0, rows[1]), np.append(0, rows[2])
    window = [
        phases[tuple(tap % s for tap, s in zip(place, g.stride, strict=True))] * size * images
        + _dot([tap // s for tap, s in zip(place, g.stride, strict=True)], steps)
        for place in itertools.product(*taps)
    ]
    positions = number * size + [_dot(index, steps) for index in itertools.product(*map(range, out[:-1]))]
    grid = Grid(plane, *(numbers.astype(np.int32) for numbers in rows))
    return grid, np.array(window), positions.reshape(-1)


def _joined(target: _Int64, source: _Int64, count: _Int64, stride: int) -> tuple[_Int64, _Int64, _Int64]:
    """Join rows that follow each other in the grid and in the input."""
    follows = (target[1:] == target[:-1] + count[:-1]) & (source[1:] == source[:-1] + stride * count[:-1])
    first = np.flatnonzero(np.append(True, ~follows)[: len(target)])
    return target[first], source[first], np.add.reduceat(count, first) if len(first) else count


def _dot(index: Sequence[int], steps: Sequence[int]) -> int:
    """Return the place of an element in flat memory. An index may lack its last number, which is then 0."""
    return sum(i * step for i, step in zip(index, steps, strict=False))


def _contiguous(position: _Int32) -> tuple[_Int32, _Int32, _Int32]:
    """Return the segments of outputs that lie like the positions."""
    n = len(position)
    return np.arange(n + 1, dtype=np.int32), position, np.full(n, 2**LANES - 1, np.int32)


def _vectors(rows: _Int64, outputs: _Int64, width: int) -> tuple[_Int32, _Int32, _Int32, _Int32]:
    """Cover rows of outputs with as few vectors as possible.

    Args:
        rows: positions of the first output of each row, ascending.
        outputs: their indices in the output.
        width: outputs in a row.

    Returns:
        The position of each vector, the start of its segments, and the output of lane 0 and the lanes of each segment.
    """
    position, start, output, lanes = [], [0], [], []
    row, column = 0, 0  # the first output that is not covered
    begins, places = rows.tolist(), outputs.tolist()
    while row < len(begins):
        first = begins[row] + column
        position.append(first)
        while row < len(begins) and begins[row] + column < first + LANES:
            lane = begins[row] + column - first
            n = min(width - column, LANES - lane)
            base, bits = places[row] + column - lane, (2**n - 1) << lane
            if lane and output[-1] == base:  # the row follows the one before in the output too
                lanes[-1] |= bits
            else:
                output.append(base)
                lanes.append(bits)
            row, column = (row + 1, 0) if column + n == width else (row, column + n)
        start.append(len(output))
    position, start, output, lanes = (np.array(numbers, np.int32) for numbers in (position, start, output, lanes))
    return position, start, output, lanes

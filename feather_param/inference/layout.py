"""Where the kernel finds the inputs of a convolution and puts the outputs, for one shape of the input.

See Note [A convolution is a sum of shifted rows] in `feather_param.inference.kernel`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LANES = 16  # outputs that are computed together, in a vector

Sizes = tuple[int, ...]
_Int32 = NDArray[np.int32]


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
    """The memory into which a channel of some images is copied: [phases, images, *sizes of a phase].

    A window of stride s moves by s pixels. The pixels are therefore grouped into phases: those of equal index modulo s,
    in each dimension. In a phase, the window moves by one pixel.
    """

    phases: int
    image: int  # floats in a phase of an image
    # Of each row of an image that is not padding: the place of its first element in the grid and in the image, and the
    # number of elements.
    target: _Int32
    source: _Int32
    count: _Int32


@dataclass(frozen=True)
class Layout:
    """The tables of the kernel for one shape of the input."""

    out: Sizes  # sizes of the output
    images: int  # in a grid
    grid: Grid | None  # None: the input itself is used
    offsets: NDArray[np.int64]  # of each column of the matrix, from the position
    position: _Int32  # of each vector: of lane 0
    segment_start: _Int32
    segment_output: _Int32
    segment_lanes: _Int32

    def plain(self, tile: int) -> _Int32:
        """Return, for each tile, the index of its first output if all its lanes are contiguous outputs, or else -1."""
        vectors = len(self.position)
        tiles = -(-vectors // tile)
        found = np.full(tiles, -1, np.int32)
        single = np.diff(self.segment_start) == 1
        first = self.segment_output[self.segment_start[:-1]]
        whole = single & (self.segment_lanes[self.segment_start[:-1]] == 2**LANES - 1)
        for i in range(tiles):
            part = slice(i * tile, min(vectors, (i + 1) * tile))
            if whole[part].all() and (np.diff(first[part]) == LANES).all():
                found[i] = first[i * tile]
        return found


@functools.lru_cache(maxsize=1024)
def layout(geometry: Geometry, batch: int, sizes: Sizes) -> Layout:
    """Return the layout for images of some sizes. A grid has several small images, so that they fill the vectors.

    Args:
        geometry: of the convolution.
        batch: images; a grid has at most so many.
        sizes: of an image.
    """
    out = geometry.output_sizes(sizes)
    channels, pixels, outputs = geometry.channels, math.prod(sizes), math.prod(out)
    moves = {*geometry.kernel_size, *geometry.stride} != {1} or any(geometry.before + geometry.after)
    if not moves and pixels >= LANES:
        position = np.append(np.arange(0, pixels - LANES, LANES), pixels - LANES).astype(np.int32)
        return Layout(out, 1, None, np.arange(channels) * pixels, position, *_contiguous(position, pixels))
    per_image = -(-outputs // LANES)
    images = min(batch, 1 if per_image >= 4 else -(-8 // per_image))
    grid, window, rows = _grid(geometry, sizes, out, images)
    offsets = np.arange(channels)[:, None] * (grid.image * images * grid.phases) + window
    first = np.arange(images)[:, None] * (geometry.out_channels * outputs) + np.arange(0, outputs, out[-1])
    return Layout(out, images, grid, offsets.reshape(-1), *_vectors(rows, first.reshape(-1), out[-1]))


def _grid(
    geometry: Geometry, sizes: Sizes, out: Sizes, images: int
) -> tuple[Grid, NDArray[np.int64], NDArray[np.int64]]:
    """Return the grid, the offset of each place in the window, and the positions of the first output of each row."""
    g = geometry
    extents = tuple(n + d * (k - 1) // s for n, k, s, d in zip(out, g.kernel_size, g.stride, g.dilation, strict=True))
    steps = [math.prod(extents[i + 1 :]) for i in range(len(extents))]
    inner = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    taps = [[d * i for i in range(k)] for k, d in zip(g.kernel_size, g.dilation, strict=True)]
    remainders = [sorted({tap % s for tap in some}) for some, s in zip(taps, g.stride, strict=True)]
    phases = {phase: i for i, phase in enumerate(itertools.product(*remainders))}
    size = math.prod(extents)
    table = []
    for phase, i in phases.items():
        low, pad, s = phase[-1], g.before[-1], g.stride[-1]
        begin = max(0, -((low - pad) // s))  # first element of the row that is not padding
        first = low - pad + s * begin
        count = max(0, min(len(range(first, sizes[-1], s)), extents[-1] - begin))
        for index in itertools.product(*map(range, extents[:-1])):
            outer = zip(index, g.stride[:-1], phase[:-1], g.before[:-1], strict=True)
            at = [j * s + low - pad for j, s, low, pad in outer]
            target = i * size * images + _dot(index, steps)
            if count and all(0 <= a < n for a, n in zip(at, sizes[:-1], strict=True)):
                table.append((target + begin, _dot(at, inner) + first, count))
    window = [
        phases[tuple(tap % s for tap, s in zip(place, g.stride, strict=True))] * size * images
        + _dot([tap // s for tap, s in zip(place, g.stride, strict=True)], steps)
        for place in itertools.product(*taps)
    ]
    rows = [i * size + _dot(index, steps) for i in range(images) for index in itertools.product(*map(range, out[:-1]))]
    grid = Grid(len(phases), size, *np.array(table, np.int32).reshape(-1, 3).T.copy())
    return grid, np.array(window), np.array(rows)


def _dot(index: Sequence[int], steps: Sequence[int]) -> int:
    """Return the place of an element in flat memory. An index may lack its last number, which is then 0."""
    return sum(i * step for i, step in zip(index, steps, strict=False))


def _contiguous(position: _Int32, pixels: int) -> tuple[_Int32, _Int32, _Int32]:
    """Return the segments of outputs that lie like the positions. The last vector repeats outputs of the one before."""
    n = len(position)
    return np.arange(n + 1, dtype=np.int32), position, np.full(n, 2**LANES - 1, np.int32)


def _vectors(rows: NDArray[np.int64], outputs: NDArray[np.int64], width: int) -> tuple[_Int32, _Int32, _Int32, _Int32]:
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
            output.append(places[row] + column - lane)
            lanes.append((2**n - 1) << lane)
            row, column = (row + 1, 0) if column + n == width else (row, column + n)
        start.append(len(output))
    position, start, output, lanes = (np.array(numbers, np.int32) for numbers in (position, start, output, lanes))
    return position, start, output, lanes

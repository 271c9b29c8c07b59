"""The sparse matrix of a layer, and its division into parts that suit the cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feather_param.inference.engine.layout import Geometry, Layout

CACHED = 24576  # bytes of inputs in a part
COLUMNS = 10  # at least, of a block in a part


@dataclass(frozen=True)
class Matrix:
    """A sparse matrix in blocks of rows, and how it is used."""

    geometry: Geometry
    activation: str  # is left out if the kernel does not know it
    rows: int  # in a block; 0: the outputs are the largest elements of the windows, and there are no values
    block_start: NDArray[np.int32]  # [blocks + 1]: first column of each block
    columns: NDArray[np.int32]
    values: NDArray[np.float32]  # [columns, rows]
    bias: NDArray[np.float32]


@dataclass(frozen=True)
class DividedMatrix:
    """A matrix whose columns are divided into parts, one part after the other."""

    parts: int
    start: NDArray[np.int32]  # [parts, blocks + 1]: first column of each block in the part
    columns: NDArray[np.int32]
    values: NDArray[np.float32]


def divided_matrix(matrix: Matrix, parts: int) -> DividedMatrix:
    """Divide the columns of a matrix into parts of about as many channels."""
    start, columns, values = matrix.block_start, matrix.columns, matrix.values
    if parts == 1:
        return DividedMatrix(1, start, columns, values)
    blocks = len(start) - 1
    window, channels = math.prod(matrix.geometry.kernel_size), matrix.geometry.channels
    part = (columns // window).astype(np.int64) * parts // channels
    key = part * blocks + np.repeat(np.arange(blocks), np.diff(start))
    order = np.argsort(key, kind="stable")
    ends = np.append(0, np.bincount(key, minlength=parts * blocks).cumsum())
    start = ends[np.arange(parts)[:, None] * blocks + np.arange(blocks + 1)].astype(np.int32)
    return DividedMatrix(parts, start, columns[order], values[order])


def parts_of(matrix: Matrix, places: Layout, tile: int) -> int:
    """Return into how many parts the columns are divided, such that the inputs of a part stay in the first cache.

    Between two parts, the sums are stored and loaded again, so that a block has enough columns in each part.

    Args:
        matrix: of the layer.
        places: the layout of the images.
        tile: vectors in a tile.
    """
    if not matrix.rows or not len(matrix.columns):
        return 1
    columns = len(matrix.columns) / max(1, len(matrix.block_start) - 1)
    inputs = places.footprint(tile) * matrix.geometry.channels
    return max(1, min(matrix.geometry.channels, round(inputs / CACHED), int(columns / COLUMNS)))

"""The job of a call of the kernel: an array of int64 with all that the machine code needs to know."""

from __future__ import annotations

import ctypes
import enum
from typing import Any

import numpy as np

LANES = 16  # floats in a vector


class Activation(enum.IntEnum):
    """What is applied to the sums."""

    IDENTITY = 0
    RELU = 1
    RELU6 = 2
    SILU = 3
    HARDSWISH = 4


class Slot(enum.IntEnum):
    """The fields of a job. Arrays are given by their addresses, and sizes in floats."""

    # Of each call:
    input = 0
    output = enum.auto()
    residual = enum.auto()  # added to the sums, before the activation
    scratch = enum.auto()  # memory for the grids of all threads

    # The matrix, in blocks of rows. Its columns are divided into parts:
    parts = enum.auto()
    part_starts = enum.auto()  # blocks + 1
    block_start = enum.auto()  # int32 [parts, blocks + 1]: first offset of each block in the part
    offsets = enum.auto()  # int32: of each weight (or each column of a block) that is not zero, from the position
    values = enum.auto()  # float32 [offsets, rows of a block]
    bias = enum.auto()  # float32 [rows]
    shares = enum.auto()  # parts into which the blocks are divided; each takes about the same time
    share_start = enum.auto()  # int32 [shares + 1]: first block of each share

    # The images. Each group of each image is computed on its own.
    images = enum.auto()
    input_image = enum.auto()  # from an image to the next
    output_image = enum.auto()
    output_row = enum.auto()  # from an output channel to the next
    groups = enum.auto()
    input_group = enum.auto()  # from a group's input to the next group's
    group_blocks = enum.auto()  # blocks of rows in a group
    scratch_floats = enum.auto()  # for the grid of a thread
    sums = enum.auto()  # where the threads' memory for sums begins in the scratch memory
    sums_floats = enum.auto()  # of a thread

    # The vectors of outputs, in tiles:
    tiles = enum.auto()
    tile_vectors = enum.auto()  # vectors in a tile
    tile = enum.auto()  # machine code of a tile
    last_tile = enum.auto()  # of the last tile, which may have fewer vectors
    position = enum.auto()  # int32 [vectors]: index of lane 0 in the grid
    segment_start = enum.auto()  # int32 [vectors + 1]: first segment of each vector
    segment_output = enum.auto()  # int32: index of the output that lane 0 would have
    segment_lanes = enum.auto()  # int32: bits of the lanes that are outputs
    plain = enum.auto()  # int32 [tiles]: index of the first output if the tile's outputs are contiguous, or -1

    # How the grid is filled. Without it, the input is read in place.
    planes = enum.auto()  # channels of a group's grid, or 0
    input_plane = enum.auto()  # from a channel of the input to the next
    grid_plane = enum.auto()
    grid_rows = enum.auto()
    row_target = enum.auto()  # int32 [grid rows + 1]: index of the row's first element in the grid's plane
    row_source = enum.auto()  # int32 [grid rows]: index of the row's first element in the input
    row_count = enum.auto()  # int32 [grid rows]: elements of the row; what follows them is padding
    stride = enum.auto()  # between the elements of the input in a row
    fill = enum.auto()  # bits of the float that pads

    # A product of a matrix with tokens, the rows of the input:
    tokens = enum.auto()
    channels = enum.auto()  # floats of a row of the input
    out_channels = enum.auto()  # floats of a row of the output
    token_grid = enum.auto()  # floats of the transposed input


PER_CALL = 4
"""The first fields of a job, which differ from call to call."""

Fields = ctypes.c_int64 * len(Slot)


class Template:
    """The fields of a job that are equal in all calls, and the arrays to which they point."""

    def __init__(self) -> None:
        self.fields = Fields()
        self._arrays: list[Any] = []  # keeps them alive

    def set(self, **values: Any) -> None:
        """Set fields to integers, or to the addresses of numpy arrays."""
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                value = np.ascontiguousarray(value)
                self._arrays.append(value)
                value = value.ctypes.data
            self.fields[Slot[name]] = value


def bits(value: float) -> int:
    """Return the bits of a float32."""
    return int(np.float32(value).view(np.int32))

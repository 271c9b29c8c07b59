"""The layout covers each output once, and its offsets are those of torch's windows."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from feather_param.inference.engine.job import LANES
from feather_param.inference.engine.layout import Geometry, layout


@st.composite
def cases(draw):
    """Return a geometry, a batch and the sizes of an image."""
    dims = draw(st.integers(1, 3))
    numbers = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * dims))  # noqa: E731
    window, stride, dilation = numbers(1, 3), numbers(1, 3), numbers(1, 2)
    before, after = numbers(0, 3), numbers(0, 3)
    sizes = tuple(
        max(1, d * (k - 1) + 1 - a - b) + more
        for d, k, a, b, more in zip(dilation, window, before, after, numbers(0, 18 if dims < 3 else 4), strict=True)
    )
    channels, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    geometry = Geometry(channels, 4 * groups, groups, window, stride, dilation, before, after)
    return geometry, draw(st.integers(1, 5)), sizes


def grid_of(places, geometry, x):
    """Return the grid of the first group as the kernel fills it from images, one row after the other."""
    if places.grid is None:
        return x.reshape(-1)
    grid = places.grid
    flat, planes = x.reshape(-1), []
    for channel in range(geometry.channels):
        plane = np.zeros(grid.plane, x.dtype)
        for target, source, count in zip(grid.target, grid.source, grid.count, strict=False):
            begin = channel * math.prod(x.shape[2:]) + source
            plane[target : target + count] = flat[begin : begin + geometry.stride[-1] * count : geometry.stride[-1]]
        planes.append(plane)
    return np.concatenate(planes)


def windows_of(geometry, x):
    """Return what each window of the first group reads, [images, columns, outputs], by torch."""
    pads = [n for pair in zip(geometry.before[::-1], geometry.after[::-1], strict=True) for n in pair]
    padded = F.pad(torch.from_numpy(x)[:, : geometry.channels], pads)
    dims = len(geometry.kernel_size)
    columns = []
    out = geometry.output_sizes(x.shape[2:])
    for channel, place in itertools.product(
        range(geometry.channels), itertools.product(*map(range, geometry.kernel_size))
    ):
        slices = [
            slice(p * d, p * d + s * (n - 1) + 1, s)
            for p, d, s, n in zip(place, geometry.dilation, geometry.stride, out, strict=True)
        ]
        columns.append(padded[(slice(None), channel, *slices)].flatten(1))
    assert dims == len(out)
    return torch.stack(columns, 1).numpy()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_the_vectors_read_what_torch_reads_and_write_each_output_once(case):
    geometry, batch, sizes = case
    places = layout(geometry, batch, sizes)
    outputs = math.prod(places.out)
    x = np.arange(1, 1 + places.images * geometry.channels * geometry.groups * math.prod(sizes), dtype=np.float64)
    x = x.reshape(places.images, -1, *sizes)
    grid = np.append(grid_of(places, geometry, x), np.full(LANES, np.nan))
    got = np.zeros((len(places.offsets), places.images * geometry.out_channels * outputs))
    times = np.zeros(got.shape[1], int)
    for vector, position in enumerate(places.position):
        for segment in range(*places.segment_start[vector : vector + 2]):
            for lane in range(LANES):
                if places.segment_lanes[segment] >> lane & 1:
                    at = places.segment_output[segment] + lane
                    times[at] += 1
                    got[:, at] = grid[position + places.offsets + lane]
    times = times.reshape(places.images, geometry.out_channels, outputs)
    assert (times[:, 0] == 1).all()
    assert not times[:, 1:].any()
    got = got.reshape(len(places.offsets), places.images, geometry.out_channels, outputs)[:, :, 0]
    assert (got.transpose(1, 0, 2) == windows_of(geometry, x)).all()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_vectors_stay_in_the_memory_of_their_channel(case):
    geometry, batch, sizes = case
    places = layout(geometry, batch, sizes)
    plane = math.prod(sizes) if places.grid is None else places.grid.plane
    window = places.offsets[: len(places.offsets) // geometry.channels]
    assert places.position.min() >= 0
    assert places.position.max() + window.max() + LANES <= plane
    if places.grid is not None:
        target, count = places.grid.target, places.grid.count
        assert (target[:-1] + count <= target[1:]).all()  # ascending, and no row overlaps the next
        assert target[-1] <= plane - LANES


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases(), st.integers(1, 4))
def test_plain_tiles_have_contiguous_outputs(case, tile):
    places = layout(*case)
    for number, first in enumerate(places.plain(tile)):
        lanes = []
        for vector in range(number * tile, min(len(places.position), (number + 1) * tile)):
            segments = range(*places.segment_start[vector : vector + 2])
            bits = [(s, lane) for s in segments for lane in range(LANES) if places.segment_lanes[s] >> lane & 1]
            lanes += [places.segment_output[s] + lane for s, lane in bits]
        vectors = min(len(places.position), (number + 1) * tile) - number * tile
        contiguous = lanes == list(range(lanes[0], lanes[0] + vectors * LANES))
        assert first == (lanes[0] if contiguous else -1)


def test_small_images_share_a_grid():
    geometry = Geometry(1, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1))
    assert layout(geometry, 64, (4, 4)).images == 8
    assert layout(geometry, 5, (4, 4)).images == 5
    assert layout(geometry, 64, (40, 40)).images == 1


def test_an_image_of_whole_vectors_is_not_copied_for_a_window_of_one():
    geometry = Geometry(3, 1, 1, (1, 1), (1, 1), (1, 1), (0, 0), (0, 0))
    assert layout(geometry, 1, (8, 8)).grid is None
    assert layout(geometry, 1, (7, 7)).grid is not None


def test_images_beyond_int32_are_refused():
    geometry = Geometry(2**11, 1, 1, (1, 1), (1, 1), (1, 1), (0, 0), (0, 0))
    with pytest.raises(
        ValueError, match=r"fewer than 2\*\*31 floats, got one of size \(1024, 1024\); use smaller images"
    ):
        layout(geometry, 1, (1024, 1024))
    padded = Geometry(1, 1, 1, (1, 1), (2**16, 1), (1, 1), (2**31, 0), (2**31, 0))
    assert layout(padded, 1, (1, 1)).out == (2**16 + 1, 1)
    with pytest.raises(ValueError, match="fewer than"):
        layout(Geometry(1, 1, 1, (1, 1), (1, 1), (1, 1), (2**16, 2**15), (2**16, 2**15)), 1, (1, 1))


def test_an_image_smaller_than_the_window_is_refused():
    geometry = Geometry(1, 1, 1, (3, 3), (1, 1), (1, 1), (0, 0), (0, 0))
    with pytest.raises(ValueError, match=r"at least the window's size \(3, 3\), got \(2, 6\)"):
        layout(geometry, 1, (2, 6))

"""The calls of the kernel for one shape of a layer's input."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feather_param.inference.engine import kernel
from feather_param.inference.engine.inputs import CPU
from feather_param.inference.engine.job import LANES, PER_CALL, Activation, Fields, Slot, Template, bits
from feather_param.inference.engine.layout import Sizes, layout
from feather_param.inference.engine.matrix import Matrix, divided_matrix, parts_of

_TILE = {0: 4, 1: 4, 4: 2}  # vectors, for blocks of so many rows: the 4 or 8 sums fit in the registers of AVX-512
_TOKENS = 64  # of a Linear layer in a grid
_FEW_TOKENS, _MANY_CHANNELS = 32, 2048  # with many channels, fewer tokens stay in the cache; or for all threads

NATIVE_ACTIVATIONS = frozenset(activation.name.lower() for activation in Activation)


def new_scratch(floats: int) -> Tensor:
    """Return memory for the grids. Its values do not matter. torch's default dtype may be smaller than a float32."""
    return torch.empty(floats, dtype=torch.float32, device=CPU)


@dataclass(frozen=True)
class _Call:
    """A call of the kernel for some of the images."""

    template: Template
    input: int  # bytes from the first element of the tensor
    output: int
    scratch: int  # floats
    run: Callable[[Any], object]

    def __call__(self, x: int, y: int, residual: int) -> None:
        job = Fields.from_buffer_copy(self.template.fields)
        if self.scratch:
            scratch = new_scratch(self.scratch)
            job[:PER_CALL] = x + self.input, y + self.output, residual + self.output, scratch.data_ptr()
        else:
            job[:PER_CALL] = x + self.input, y + self.output, residual + self.output, 0
        self.run(job)


class Plan:
    """How a layer computes inputs of one shape.

    Attributes:
        shape: of the output.

    Args:
        layer: its sparse matrix.
        leading: sizes of the dimensions before the channels: images, or tokens if the layer is Linear.
        sizes: of an image; none if the layer is Linear.

    Raises:
        ImportError: llvmlite is not installed.
        ValueError: the images are too small or too large.
    """

    def __init__(self, layer: Matrix, leading: Sizes, sizes: Sizes) -> None:
        self._layer, self._batch, self._sizes = layer, math.prod(leading), sizes
        self._threads = kernel.available_threads()
        self._out = layer.geometry.output_sizes(sizes) if sizes else ()
        self.shape = (*leading, layer.geometry.out_channels, *self._out)
        name = layer.activation
        self._activation = Activation[name.upper()] if name in NATIVE_ACTIVATIONS else Activation.IDENTITY
        self._calls = self._planned(residual=False)

    @functools.cached_property
    def _calls_with_residual(self) -> tuple[_Call, ...]:
        return self._planned(residual=True)

    def run(self, x: Tensor, y: Tensor, residual: Tensor | None = None) -> None:
        """Compute the output y of an input x. All tensors are contiguous and of float32.

        Args:
            x: the input.
            y: the output. Its elements are written.
            residual: of the output's shape, added before the activation; not for Linear layers.

        Raises:
            RuntimeError: a tensor has elements, but no memory.
        """
        calls = self._calls if residual is None else self._calls_with_residual
        input_, output, added = x.data_ptr(), y.data_ptr(), 0 if residual is None else residual.data_ptr()
        if not (input_ and output and (added or residual is None)):
            _require_memory(x, y, *(() if residual is None else (residual,)))
        for call in calls:
            call(input_, output, added)

    def _planned(self, residual: bool) -> tuple[_Call, ...]:
        if not self._batch:
            return ()
        if self._sizes:
            return tuple(self._convolutions(self._sizes, residual))
        if residual:
            raise ValueError("expected no residual for a Linear layer, got one; add it to the output")
        if self._batch == 1:
            return (self._product(),)
        return tuple(self._products())

    def _product(self) -> _Call:
        """Return the call for one token."""
        template = self._template()
        starts = _shares(self._layer.block_start, self._threads)
        template.set(offsets=self._layer.columns, shares=self._threads, share_start=starts)
        run = kernel.worker("product", self._threads, self._activation, self._layer.rows)
        return _Call(template, 0, 0, 0, run)

    def _products(self) -> list[_Call]:
        """Return the calls for several tokens: they are the pixels of images."""
        g, calls = self._layer.geometry, []
        uneven = -(-self._batch // _TOKENS) % self._threads
        tokens = _FEW_TOKENS if uneven or g.channels > _MANY_CHANNELS else _TOKENS
        full, rest = divmod(self._batch, tokens)
        run = kernel.worker("tokens", self._threads)
        for images, rows, start in ((full, tokens, 0), (1, rest, full * tokens)):
            if images and rows:
                pixels = -(-rows // LANES) * LANES
                template = self._images(images, (pixels,), residual=False)
                floats = (g.channels + g.out_channels) * pixels
                template.set(
                    tokens=rows,
                    channels=g.channels,
                    out_channels=g.out_channels,
                    scratch_floats=floats,
                    token_grid=g.channels * pixels,
                    sums=self._threads * floats,
                    input_image=rows * g.channels,
                    output_image=rows * g.out_channels,
                )
                input_, output = 4 * start * g.channels, 4 * start * g.out_channels
                scratch = self._threads * (floats + template.fields[Slot.sums_floats])
                calls.append(_Call(template, input_, output, scratch, run))
        return calls

    def _convolutions(self, sizes: Sizes, residual: bool) -> list[_Call]:
        """Return the calls for images."""
        g, calls = self._layer.geometry, []
        together = layout(g, self._batch, sizes).images
        rest = self._batch % together
        run = kernel.worker("convolution", self._threads)
        for images, start in ((self._batch - rest, 0), (rest, self._batch - rest)):
            if images:
                template = self._images(images, sizes, residual)
                input_ = 4 * start * g.channels * g.groups * math.prod(sizes)
                output = 4 * start * g.out_channels * math.prod(self._out)
                template.set(sums=self._threads * template.fields[Slot.scratch_floats])
                scratch = template.fields[Slot.sums] + self._threads * template.fields[Slot.sums_floats]
                calls.append(_Call(template, input_, output, scratch, run))
        return calls

    def _images(self, batch: int, sizes: Sizes, residual: bool) -> Template:
        """Return the fields for images of some sizes."""
        layer, g, threads = self._layer, self._layer.geometry, self._threads
        places = layout(g, batch, sizes)
        pixels, outputs, images = math.prod(sizes), math.prod(places.out), batch // places.images
        size, vectors = _TILE[layer.rows], len(places.position)
        blocks = g.out_channels // g.groups // max(1, layer.rows)
        tiles = -(-vectors // size)
        divided = images * g.groups % threads and tiles < 8 * threads  # else each thread gets whole tiles
        shares = threads if divided and g.groups == 1 else 1
        start = _shares(layer.block_start, shares) if shares > 1 else np.array([0, blocks], np.int32)
        matrix = divided_matrix(layer, parts_of(layer, places, size))
        template = self._template()
        sums = int(np.diff(start).max()) * max(1, layer.rows) * size * LANES if matrix.parts > 1 else 0
        template.set(
            parts=matrix.parts,
            part_starts=len(layer.block_start),
            block_start=matrix.start,
            offsets=places.offsets[matrix.columns],
            values=matrix.values,
            sums_floats=sums,
            images=images,
            input_image=g.channels * g.groups * pixels * places.images,
            output_image=g.out_channels * outputs * places.images,
            output_row=outputs,
            groups=g.groups,
            input_group=g.channels * pixels,
            group_blocks=blocks,
            shares=shares,
            share_start=start,
            tiles=tiles,
            tile_vectors=size,
            tile=kernel.tile(layer.rows, size, self._activation, residual),
            last_tile=kernel.tile(layer.rows, vectors - (tiles - 1) * size, self._activation, residual),
            position=places.position,
            segment_start=places.segment_start,
            segment_output=places.segment_output,
            segment_lanes=places.segment_lanes,
            plain=places.plain(size),
        )
        if (grid := places.grid) is not None:
            template.set(
                planes=g.channels,
                input_plane=pixels,
                grid_plane=grid.plane,
                scratch_floats=g.channels * grid.plane,
                grid_rows=len(grid.source),
                row_target=grid.target,
                row_source=grid.source,
                row_count=grid.count,
                stride=g.stride[-1],
                fill=bits(0.0 if layer.rows else -math.inf),
            )
        return template

    def _template(self) -> Template:
        template, layer = Template(), self._layer
        template.set(parts=1, block_start=layer.block_start, values=layer.values, bias=layer.bias)
        return template


def _require_memory(*tensors: Tensor) -> None:
    if any(tensor.numel() and not tensor.data_ptr() for tensor in tensors):
        raise RuntimeError(
            "expected tensors with memory, got one without, for example from torch.export or of a subclass of Tensor; "
            "use the dense model"
        )


def _shares(crow: NDArray[np.int32], shares: int) -> NDArray[np.int32]:
    """Divide blocks such that each share takes about the same time. A row takes as long as three more weights."""
    work = crow + np.arange(len(crow)) * 3
    return np.searchsorted(work, np.linspace(0, work[-1], shares + 1)).astype(np.int32)

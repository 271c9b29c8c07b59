"""A call of the kernel for one shape of the input: its job."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feather_param.inference import kernel
from feather_param.inference.kernel import TILE, Activation, Slot
from feather_param.inference.layout import Layout, Sizes, layout

_TOKENS = 64
_Fields = ctypes.c_int64 * len(Slot)


class Plan:
    def __init__(self) -> None:
        self.shape: Sizes = ()
        self.calls: list[
            tuple[Any, int, int, int, Any]
        ] = []  # template, input offset, output offset, scratch floats, keep

    def run(self, x: Tensor, y: Tensor, residual: Tensor | None) -> None:
        run = kernel.compiled().run
        a, b = x.data_ptr(), y.data_ptr()
        for fields, i, o, floats, _ in self.calls:
            job = _Fields.from_buffer_copy(fields)
            job[Slot.input], job[Slot.output] = a + i, b + o
            if residual is not None:
                job[Slot.residual] = residual.data_ptr() + o
            if floats:
                scratch = torch.empty(floats)
                job[Slot.scratch] = scratch.data_ptr()
            run(job)


def plan(layer: Any, leading: Sizes, sizes: Sizes, threads: int) -> Plan:
    g = layer.geometry
    p = Plan()
    batch = math.prod(leading)
    if batch == 0:
        p.shape = (*leading, g.out_channels, *(g.output_sizes(sizes) if layer.dims else ()))
        return p
    if not layer.dims:
        p.shape = (*leading, g.out_channels)
        if batch == 1 and layer.rows == 1:
            fields, keep = _fields(layer, threads)
            offsets = layer.columns
            shares = _shares(layer.block_start.numpy(), threads)
            _set(fields, keep, offsets=offsets.numpy(), vectors=0, shares=threads, share_start=shares)
            p.calls.append((bytes(fields), 0, 0, 0, keep))
            return p
        tokens = _TOKENS if g.channels <= 2048 else 32
        full, rest = divmod(batch, tokens)
        for images, rows, start in ((full, tokens, 0), (1, rest, full * tokens)):
            if images and rows:
                pixels = -(-rows // 16) * 16
                fields, keep, _ = _call(layer, images, (pixels,), threads)
                size = (g.channels + g.out_channels) * pixels
                _set(
                    fields,
                    keep,
                    tokens=rows,
                    channels=g.channels,
                    output_rows=g.out_channels,
                    scratch_floats=size,
                    grid_floats=g.channels * pixels,
                    input_image=rows * g.channels,
                    output_image=rows * g.out_channels,
                    output_row=pixels,
                )
                p.calls.append(
                    (bytes(fields), start * g.channels * 4, start * g.out_channels * 4, threads * size, keep)
                )
        return p
    l = layout(g, batch, sizes)
    p.shape = (*leading, g.out_channels, *l.out)
    full, rest = divmod(batch, l.images)
    ins, outs = 4 * math.prod(sizes) * g.channels * g.groups, 4 * math.prod(l.out) * g.out_channels
    for n, start in ((full * l.images, 0), (rest, full * l.images)):
        if n:
            fields, keep, l_ = _call(layer, n, sizes, threads)
            floats = 0
            if l_.grid:
                per = g.channels * l_.grid.phases * l_.grid.image * l_.images
                floats = threads * per + 64
            p.calls.append((bytes(fields), start * ins, start * outs, floats, keep))
    return p


def _call(layer: Any, batch: int, sizes: Sizes, threads: int) -> tuple[Any, list[Any], Layout]:
    g = layer.geometry
    l = layout(g, batch, sizes)
    fields, keep = _fields(layer, threads)
    pixels, outputs = math.prod(sizes), math.prod(l.out)
    images = batch // l.images
    tile = TILE[layer.rows]
    tiles = -(-len(l.position) // tile)
    apart = images * g.groups >= threads
    blocks = g.out_channels // g.groups // layer.rows
    shares = threads if not apart and threads > 1 and tiles < 8 * threads else 1
    start = _shares(layer.block_start.numpy(), shares) if shares > 1 else np.array([0, blocks], np.int32)
    _set(
        fields,
        keep,
        offsets=l.offsets.astype(np.int32)[layer.columns.numpy()],
        images=images,
        input_image=g.channels * g.groups * pixels * l.images,
        output_image=g.out_channels * outputs * l.images,
        output_row=outputs,
        groups=g.groups,
        input_group=g.channels * pixels,
        group_blocks=blocks,
        block_rows=layer.rows,
        shares=shares,
        share_start=start,
        vectors=len(l.position),
        position=l.position,
        segment_start=l.segment_start,
        segment_output=l.segment_output,
        segment_lanes=l.segment_lanes,
        plain=l.plain(tile),
    )
    if l.grid is not None:
        grid = l.grid
        _set(
            fields,
            keep,
            copies=g.channels,
            plane_images=l.images,
            plane_image=g.channels * g.groups * pixels,
            input_plane=pixels,
            grid_plane=grid.phases * grid.image * l.images,
            grid_image=grid.image,
            scratch_floats=g.channels * grid.phases * grid.image * l.images,
            grid_rows=len(grid.target),
            row_target=grid.target,
            row_source=grid.source,
            row_count=grid.count,
            stride=g.stride[-1],
            fill=0,
        )
    return fields, keep, l


def _fields(layer: Any, threads: int) -> tuple[Any, list[Any]]:
    fields, keep = _Fields(), []
    _set(
        fields,
        keep,
        threads=threads,
        block_start=layer.block_start.numpy(),
        values=layer.values.numpy(),
        bias=layer.bias.numpy(),
        activation=int(Activation[layer.activation.upper()]) if layer.activation in NATIVE_ACTIVATIONS else 0,
        low=_bits(LIMITS.get(layer.activation, _NONE)[0]),
        high=_bits(LIMITS.get(layer.activation, _NONE)[1]),
    )
    return fields, keep


def _set(fields: Any, keep: list[Any], **values: Any) -> None:
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            keep.append(value)
            value = value.ctypes.data
        fields[Slot[name]] = value


def _shares(crow: Any, shares: int) -> Any:
    """Divide blocks such that each share has about as many nonzeros."""
    work = crow + np.arange(len(crow)) * 3
    return np.searchsorted(work, np.linspace(0, work[-1], shares + 1)).astype(np.int32)


_NONE = (-math.inf, math.inf)
NATIVE_ACTIVATIONS = frozenset(a.name.lower() for a in Activation)
LIMITS = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


def _bits(x: float) -> int:
    return int(np.float32(x).view(np.int32))

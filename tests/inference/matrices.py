"""Sparse matrices of layers, as the kernel takes them, and a comparison with float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from feather_param.inference.engine.layout import Geometry
from feather_param.inference.engine.matrix import Matrix
from feather_param.inference.engine.plan import Plan

ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}
_SLOPE = 1.5  # no activation has a steeper one


def matrix_of(layer, rows=1, activation="identity"):
    """Return the sparse matrix of a Linear or Conv layer that pads with zeros."""
    weight = layer.weight.detach()
    out_channels, channels = weight.shape[:2]
    if isinstance(layer, nn.Linear):
        geometry = Geometry(channels, out_channels, 1, (1,), (1,), (1,), (0,), (0,))
    else:
        padding = layer._reversed_padding_repeated_twice
        pads = tuple(padding[-2::-2]), tuple(padding[-1::-2])
        geometry = Geometry(
            channels, out_channels, layer.groups, layer.kernel_size, layer.stride, layer.dilation, *pads
        )
    blocks = weight.reshape(out_channels // rows, rows, -1)
    block, col = blocks.any(1).nonzero(as_tuple=True)
    start = F.pad(torch.bincount(block, minlength=len(blocks)).cumsum(0), (1, 0)).int()
    bias = torch.zeros(out_channels) if layer.bias is None else layer.bias.detach()
    tensors = start, col.int(), blocks[block, :, col].contiguous(), bias
    return Matrix(geometry, activation, rows, *(tensor.numpy() for tensor in tensors))


def computed(layer, x, residual=None, rows=1, activation="identity"):
    """Return the output of the kernel."""
    plan = Plan(matrix_of(layer, rows, activation), (len(x),), tuple(x.shape[2:]))
    y = x.new_full(plan.shape, math.nan)
    plan.run(x.contiguous(), y, residual)
    return y


def bounded(layer, x, residual=None, activation="identity"):
    """Return the output in float64, and a bound of what roundings in float32 may change.

    A sum of n products, a bias and a residual, in any order, has at most n + 2 roundings of each term. An activation
    adds a few roundings of its input.
    """

    def forward(x, weight, bias, residual):
        y = F.linear(x, weight, bias) if isinstance(layer, nn.Linear) else layer._conv_forward(x, weight, bias)
        return y if residual is None else y + residual

    given = (x, layer.weight.detach(), layer.bias, residual)
    given = [None if value is None else value.detach().double() for value in given]
    total = forward(*given)
    terms = forward(*(None if value is None else value.abs() for value in given))
    n = int(layer.weight.count_nonzero(dim=tuple(range(1, layer.weight.dim()))).max())
    roundings = n + 2 + (0 if activation in ("identity", "relu", "relu6") else 8)
    return ACTIVATIONS[activation](total), _SLOPE * roundings * torch.finfo(torch.float32).eps * terms


def assert_computes(layer, x, residual=None, rows=1, activation="identity"):
    """Compare the kernel with float64."""
    got = computed(layer, x, residual, rows, activation)
    expected, bound = bounded(layer, x, residual, activation)
    assert got.shape == expected.shape
    assert ((got - expected).abs() <= bound).all()

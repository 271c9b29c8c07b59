"""Pruned models for the tests of sparse inference, and a comparison of a layer with the dense one."""

from __future__ import annotations

import copy

import torch
from torch import nn

from feather_param.inference.fusing.fuse import ACTIVATIONS
from feather_param.inference.layers import SparseLayer


def pruned(layer, rate=0.8):
    """Return the layer with a fraction of zeros in every weight."""
    for module in layer.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            generator = torch.Generator().manual_seed(0)
            module.weight.data[torch.rand(module.weight.shape, generator=generator) < rate] = 0
    return layer.eval()


X = torch.randn(2, 3, 6, 6)


def network():
    """Return a small pruned network for the input X."""
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 4))
    return pruned(nn.Sequential(*body))


NETWORKS = {"dense": {"fused": 1.0, "sparse": 0.99}, "fused": {"sparse": 0.99}, "sparse": {}}
"""Times for the fixture clock, for which each network is the best."""


def names_of(model, kind=SparseLayer):
    """Return the names of the layers of a kind."""
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


# Of an activation's output, for an error of 1 of its input: the largest slope of GELU is 1.13, and of Hardswish 1.5.
SLOPE = 1.5


def assert_computes_the_same(sparse, layer, x, residual=None, activation="identity"):
    """Compare with float64. A sum of n products, a bias and a residual has at most n + 2 roundings of each term."""
    twin, size = copy.deepcopy(layer).double(), copy.deepcopy(layer).double()
    for parameter in size.parameters():
        parameter.data.abs_()
    added = 0.0 if residual is None else residual.double()
    expected = ACTIVATIONS[activation](twin(x.double()) + added)
    terms = size(x.double().abs()) + (0.0 if residual is None else residual.double().abs())  # padding is exact
    got = sparse(x) if residual is None else sparse(x, residual)
    n = int(layer.weight.count_nonzero(dim=tuple(range(1, layer.weight.dim()))).max())
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    # The activation itself has a few roundings more.
    error = SLOPE * (n + 2 + (0 if activation == "identity" else 8)) * torch.finfo(torch.float32).eps * terms
    assert ((got - expected).abs() <= error).all()

"""Networks for the tests of fusing, and comparisons with the model."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from feather_param.inference.fusing.fuse import FusedLayer, fused

X = torch.randn(2, 4, 6, 6)
ROWS = torch.randn(5, 4)


def conv(bias=True):
    return nn.Conv2d(4, 4, 3, padding=1, bias=bias)


def bn(**options):
    return nn.BatchNorm2d(4, **options)


def seq(*layers):
    return nn.Sequential(*layers)


class Net(nn.Module):
    """A module with a given forward."""

    def __init__(self, forward, **children):
        super().__init__()
        self.call = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.call(self, x)


def asserting(m, x):
    """A forward with assert statements, which pytest would rewrite in a test module."""
    assert x.shape[1] == 4, "no"
    assert x.dim() == 4
    return m.a(x)


def measured_norms(model):
    """Return the model in eval mode, with statistics and weights of its norms as after a training."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, _NormBase):
            for name, low, high in (
                ("running_mean", -1, 1),
                ("running_var", 0.5, 2),
                ("weight", 0.5, 2),
                ("bias", -1, 1),
            ):
                tensor = getattr(module, name)
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


def graph_of(model, *arguments):
    """Return the fused graph, which must exist."""
    graph, reason = fused(model, arguments)
    assert graph is not None, reason
    assert reason == ""
    return graph


def agree(model, x):
    """Return the fused graph, after comparing it with the model for inputs of three sizes."""
    graph = graph_of(model, x)
    exact = copy.deepcopy(model).double()
    for size in (x.shape, (2 * len(x), *x.shape[1:]), (1, *x.shape[1:])):
        batch = torch.randn(size)
        with torch.no_grad():
            outputs = graph(batch.clone()), model(batch.clone()), exact(batch.double())
        for got, near, wanted in zip(*(o if isinstance(o, tuple) else (o,) for o in outputs), strict=True):
            finite = near.isfinite()
            error, scale = (float(t[finite].abs().max()) if finite.any() else 0.0 for t in (near - wanted, wanted))
            bound = 32 * error + 64 * torch.finfo(got.dtype).eps * scale
            assert torch.allclose(
                got, torch.where(finite, wanted.to(got.dtype), near), rtol=0, atol=bound, equal_nan=True
            )
    return graph


def fused_layers(graph):
    """Return the fused layers by name."""
    return {name: module for name, module in graph.named_modules() if isinstance(module, FusedLayer)}


def summary(graph):
    """Return the number of batch norms that are left, of additions in layers, and the activations of the layers."""
    layers = fused_layers(graph)
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in graph.modules())
    additions = sum(len(node.args) == 2 for node in graph.graph.nodes if node.target in layers)
    return norms, additions, ", ".join(layer.activation for layer in layers.values())

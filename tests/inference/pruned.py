"""Pruned models for the tests of sparse inference."""

from __future__ import annotations

import torch
from torch import nn


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

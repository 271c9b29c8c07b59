"""Models whose weights are selected."""

from __future__ import annotations

import torch
from torch import nn

from feather_param.selection.select import Selection


def names(selection: Selection) -> list[str]:
    """Return the names of the selected weights."""
    return [weight.name for weight in selection.weights]


def small_net() -> nn.Sequential:
    """Return a network with prunable weights of 108, 32 and 16 elements, and an embedding."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        nn.Embedding(3, 3),
    )


class ManyKinds(nn.Module):
    """Linear layers, and layers whose weights are pruned only if include names them."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(3, 4)
        self.lstm = nn.LSTM(4, 4)
        self.att = nn.MultiheadAttention(4, 2)
        self.pair = nn.ParameterDict({"left": nn.Parameter(torch.ones(2, 2)), "right": nn.Parameter(torch.ones(2, 2))})
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ModuleDict({"emb2": nn.Embedding(2, 4)}))
        self.fc = nn.Linear(4, 4)

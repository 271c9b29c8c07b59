"""A small network, trained for a few steps, and reports of many layers."""

from __future__ import annotations

import torch
from torch import nn

import feather_param
from feather_param.reports import History, Report, Row, multiply_adds
from tests.training import train

RATE = 0.8


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 25, 7)]
    return nn.Sequential(*layers).to(dtype)


def loss(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, 5, 5, generator=generator).to(next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(x).float(), torch.arange(8) % 7)


def started(seed: int = 0, dtype: torch.dtype = torch.float32):
    model = network(seed, dtype)
    controller = feather_param.sparsify(model, final_rate=RATE, total_steps=12)
    return model, torch.optim.AdamW(model.parameters(), lr=0.03), controller


def trained():
    model, optimizer, controller = started()
    history = History(controller)
    for step in range(12):
        train(model, loss, controller, [step], optimizer)
        if step % 3 == 2:
            history.record()
    return controller.report(), history, multiply_adds(model, torch.zeros(1, 3, 5, 5))


def many(count: int, name: str = "features.denseblock1.denselayer{}.conv1.weight") -> Report:
    rows = [Row(name.format(i), (64, 64, 3, 3), 36_864, 36_864 - 40 * i, 1 / count, 64) for i in range(count)]
    return Report(tuple(rows), {"embedding.weight": "a weight of Embedding: name it in include to prune it"})

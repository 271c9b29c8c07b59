"""A small network, its batches and a training step, for tests that train a few steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = 2328
"""Number of prunable elements of the network."""


def net(seed: int | None = 0) -> nn.Sequential:
    """Return a network with prunable weights 0.weight (216 elements), 3.weight (2048) and 4.weight (64).

    Args:
        seed: seed of its weights; None: use torch's generator in its current state.
    """
    if seed is not None:
        torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 16), nn.Linear(16, 4))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return the images and classes of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 6, 6, generator=generator), torch.randint(4, (8,), generator=generator)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    """Make one optimizer step and return the loss."""
    x, y = batch(step)
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()

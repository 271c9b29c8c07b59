"""A classifier that an optimizer trains and a controller follows, and a check that all views of it agree."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import feather_param
from tests.core.models import linear_net
from tests.training import zeros_in

SIZE = 16 * 32 + 32 * 4  # number of prunable elements
INPUTS = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
LABELS = INPUTS[:, :4].argmax(1)


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make one optimizer step on all inputs."""
    optimizer.zero_grad()
    F.cross_entropy(model(INPUTS), LABELS).backward()
    optimizer.step()


def trained_classifier(
    steps: int = 8, seed: int = 0, **arguments
) -> tuple[nn.Sequential, torch.optim.Optimizer, feather_param.Controller]:
    """Return a sparsified classifier after some steps, with its optimizer and controller."""
    model = linear_net(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    arguments = {"final_rate": 0.9, "total_steps": 8, "end_step": 4, "optimizer": optimizer, **arguments}
    controller = feather_param.sparsify(model, **arguments)
    for _ in range(steps):
        make_step(model, optimizer)
    return model, optimizer, controller


def require_agreement(model: nn.Module, controller: feather_param.Controller | None, zeros: int) -> None:
    """Check that a model is evaluated, reported and baked with the same weights and this number of zeros."""
    output = model(INPUTS)
    assert zeros_in(model) == zeros
    if controller is not None:
        assert controller.report().zeros == zeros
        assert sum(int((~mask).sum()) for mask in controller.masks().values()) == zeros
    plain = linear_net(seed=1)
    plain.load_state_dict(feather_param.baked_state_dict(model))
    assert zeros_in(plain) == zeros
    assert torch.equal(plain(INPUTS), output)

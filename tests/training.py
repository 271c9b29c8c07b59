"""What many tests do: train a few steps, then look at the zeros."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import feather_param
from feather_param.parametrizations import states_of
from feather_param.selection.weights import Place


def train(
    model: nn.Module,
    loss: Callable[[nn.Module, int], Tensor],
    controller: feather_param.Controller,
    steps: Iterable[int] = range(5),
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Make optimizer steps, each followed by the controller's."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in steps:
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        controller.step()


def pruned_places(model: nn.Module) -> list[Place]:
    """Return the first place of each weight of a sparsified model."""
    registrations = [each for shared in states_of(model) for each in shared.registrations.values()]
    first = {each.weight: each.place for each in reversed(registrations)}
    return list(first.values())[::-1]


def dense_weights(model: nn.Module) -> list[Tensor]:
    """Return the dense weights of a sparsified model."""
    return [weight for shared in states_of(model) for weight in shared.weights().values()]


def zeros_after_baking(model: nn.Module) -> tuple[int, int]:
    """Desparsify; return the zeros among the weights that were pruned, and how many these weights are."""
    places = pruned_places(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing survives")
        feather_param.desparsify(model)
    tensors = [place.dense() for place in places]
    return sum(int((tensor == 0).sum()) for tensor in tensors), sum(tensor.numel() for tensor in tensors)


def keys(model: nn.Module) -> list[tuple[str, type]]:
    """Return what must be as before: state_dict keys and classes."""
    return [(name, type(module)) for name, module in model.named_modules()] + [(k, Tensor) for k in model.state_dict()]

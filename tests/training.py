"""Helpers of many tests: train, count zeros, compare tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

import feather_param
from feather_param.parametrizations import states_of
from feather_param.selection.weights import Place
from tests import twins


def train(
    model: nn.Module,
    loss: Callable[[nn.Module, int], Tensor],
    controller: feather_param.Controller,
    steps: Iterable[int] = range(5),
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Make optimizer steps, each followed by a step of the controller."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in steps:
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        controller.step()


def pruned_places(model: nn.Module) -> list[Place]:
    """Return the first place of each weight of a sparsified model."""
    registrations = [each for shared in states_of(model) for each in shared.registrations.values()]
    first = {each.name: each.place for each in reversed(registrations)}
    return list(first.values())[::-1]


def dense_weights(model: nn.Module) -> list[Tensor]:
    """Return the dense weights of a sparsified model."""
    return [weight for shared in states_of(model) for weight in shared.weights().values()]


def zeros_in(model: nn.Module) -> int:
    """Return the number of zeros in the Linear and Conv weights that a forward pass uses."""
    return twins.count_zeros(twins.prunable(model))


def zeros_after_baking(model: nn.Module) -> tuple[int, int]:
    """Desparsify a model. Return the number of zeros in the weights that were pruned, and of all their elements."""
    places = pruned_places(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing survives")
        feather_param.desparsify(model)
    tensors = [place.value() for place in places]
    return sum(int((tensor == 0).sum()) for tensor in tensors), sum(tensor.numel() for tensor in tensors)


def zero_where_masked(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> bool:
    """Return whether weights are zero exactly where their masks are False."""
    return all(torch.equal(weights[name] != 0, mask) for name, mask in masks.items())


def all_equal(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Return whether the tensors of two lists are equal, in order."""
    return all(torch.equal(one, other) for one, other in zip(tensors, others, strict=True))


def same_state(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether two state_dicts have the same names in the same order, and equal tensors."""
    return list(state) == list(other) and all_equal(state.values(), other.values())


def keys(model: nn.Module) -> list[tuple[str, type]]:
    """Return the names and classes of all modules, and the names in the state_dict."""
    return [(name, type(module)) for name, module in model.named_modules()] + [(k, Tensor) for k in model.state_dict()]

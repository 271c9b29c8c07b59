"""Models whose saved states are baked, and the check that a state is baked like its model."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

import feather_param
from feather_param import allocations

ENTRY = "0.parametrizations.weight.0.shared._extra_state"


def bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor, so that 0.0 and -0.0 differ."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def require_same(model: nn.Module, in_order: bool = True) -> dict[str, Tensor]:
    """Check that the saved state of a model is baked to its baked state, and return it."""
    saved = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of early bakes, and of weights with no survivors
        found, expected = feather_param.baked_state_dict(saved), feather_param.baked_state_dict(model)
    assert (list if in_order else set)(found) == (list if in_order else set)(expected)
    assert getattr(found, "_metadata", None) == getattr(expected, "_metadata", None)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].stride() == tensor.stride(), name
        assert torch.equal(bits(found[name]), bits(tensor)), name
    return found


def two_groups(weights, zeros, guards):
    """Rank the last and the first weight together, ties in this order, and prune two thirds of the zeros from them."""
    names = list(weights)
    halves = [{name: weights[name] for name in part} for part in (names[::-2], names[1::2])]
    first = zeros - zeros // 3
    return [
        allocations.Group(tuple(half), k, allocations.global_magnitude(half, k, {})[0].threshold)
        for half, k in zip(halves, (first, zeros - first), strict=True)
    ]


def linear(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """Return layers whose inputs the patterns divide, of 576, 384 and 128 elements."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 16), nn.Linear(16, 8)).to(dtype)


def tied() -> nn.Module:
    """Return layers of which two share their weight."""
    model = nn.ModuleDict({"a": nn.Linear(12, 12), "b": nn.Linear(12, 12), "c": nn.Linear(12, 4)})
    model["b"].weight = model["a"].weight
    return model


def used_twice() -> nn.Module:
    """Return layers of which one has two names."""
    layer = nn.Linear(12, 12)
    return nn.ModuleDict({"first": layer, "between": nn.Linear(12, 12), "again": layer})

"""Sparsified models with optimizers that were built before or after `sparsify`."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import feather_param
from tests.network import net

random_conv_net = functools.partial(net, seed=None)
"""Return a `net` with other weights at each call."""


class Run:
    """A sparsified model and its optimizer.

    Args:
        make: makes the model.
        optimizer: makes the optimizer from parameters or parameter groups.
        built_first: whether the optimizer is built before `sparsify`.
        include: of `sparsify`.
        prepare: returns the parameters or groups for the optimizer, given all parameters and their plain names.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        optimizer: Callable[[Any], torch.optim.Optimizer],
        *,
        built_first: bool,
        include: Any = "*",
        prepare: Callable[[list, dict], list] = lambda parameters, names: parameters,
    ) -> None:
        self.model = make()
        self.names = {parameter: name for name, parameter in self.model.named_parameters()}  # of the plain model
        if built_first:
            self.optimizer = optimizer(prepare(list(self.model.parameters()), self.names))
        self.controller = feather_param.sparsify(self.model, final_rate=0.5, total_steps=9, include=include)
        if not built_first:
            self.optimizer = optimizer(prepare(list(self.model.parameters()), self.names))

    def follow(self) -> Run:
        """Let the controller follow the optimizer."""
        self.controller.follow(self.optimizer)
        return self

    def train(self) -> Run:
        """Make two steps with random gradients."""
        for _ in range(2):
            for parameter in self.names:
                parameter.grad = torch.randn_like(parameter)
            self.optimizer.step()
        return self

    def saved(self) -> dict:
        """Return the optimizer's state after it was written to a file and read again."""
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    @property
    def states(self) -> dict[str, dict]:
        """The optimizer's state of each parameter, by its name in the plain model."""
        return {self.names.get(parameter, "foreign"): state for parameter, state in self.optimizer.state.items()}

    def has_states_of(self, other: Run) -> bool:
        """Return whether two optimizers have equal states of the parameters of the same names."""
        mine, theirs = self.states, other.states
        return mine.keys() == theirs.keys() and all(equal_states(mine[name], theirs[name]) for name in mine)


def equal_states(one: dict, other: dict) -> bool:
    """Return whether an optimizer's states of two parameters are equal."""

    def equal(a, b):
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make one optimizer step of a `net`."""
    optimizer.zero_grad()
    model(torch.ones(2, 3, 6, 6)).sum().backward()
    optimizer.step()


def sgd(model: nn.Module, **arguments) -> torch.optim.Optimizer:
    """Return an SGD optimizer of all parameters of a model."""
    return torch.optim.SGD(model.parameters(), lr=0.1, **arguments)

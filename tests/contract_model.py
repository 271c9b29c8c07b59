"""The networks of `test_contract`, and what a slow reference expects of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests import pattern_twins, twins


class Tied(nn.Module):
    """Two layers with the same weight, and a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.attention(x[None], x[None], x[None])[0][0])


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 2)
    )


# By model: the patterns that divide its weights, named as in `pattern_twins`.
_FIT = ["elements", "elements", "blocks(1, 2)", "n_m(1, 2)", "n_m(2, 4)"]
PATTERNS = {"mlp": ["elements"] * 5, "tied": _FIT, "convolutional": ["elements"] * 5, "attention": _FIT}
MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3, bias=False)),
    "tied": Tied,
    "convolutional": convolutional,
    "attention": Attention,
}


def weight_names(model: nn.Module) -> list[str]:
    """Return the names of the parametrized tensors of a model, in its order."""
    names: list[str] = []
    for prefix, module in model.named_modules():
        if "parametrizations" not in prefix.split(".") and "parametrizations" in module._modules:
            names += [f"{prefix}.{tensor}" for tensor in module.parametrizations]  # type: ignore[union-attr]
    return names


def used_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that a forward pass uses, by name; a tied weight under each of its names."""
    found: dict[str, Tensor] = {}
    for name in weight_names(model):
        prefix, _, tensor = name.rpartition(".")
        found[name] = getattr(model.get_submodule(prefix), tensor).detach()
    return found


@dataclass
class Expected:
    """What determines the zeros of a network, besides its weights."""

    zeros: int = 0
    step: int = 0
    masks: dict[str, Tensor] | None = None  # if frozen
    frozen_step: int | None = None

    def clone(self) -> Expected:
        return copy.deepcopy(self)

    def follow(self, source: Expected) -> None:
        """Take the number of zeros and the step of the source of a copy."""
        if self.masks is None:
            self.zeros = source.zeros
            self.step = source.step if source.masks is None else source.frozen_step


@dataclass
class Network:
    """A sparsified model or a copy of one."""

    model: nn.Module
    expected: Expected
    source: Expected | None = None  # of a copy

    def __post_init__(self) -> None:
        self.note_weights()

    def __repr__(self) -> str:
        return f"Network({self.expected})"

    def weights(self) -> dict[str, Tensor]:
        """Return the dense weights by name; a tied weight once."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if name.endswith(".original"):
                found[name.replace("parametrizations.", "").removesuffix(".original")] = parameter.detach()
        return {name: found[name] for name in weight_names(self.model) if name in found}

    def bits(self) -> list[Tensor]:
        return [weight.clone().view(torch.uint8) for weight in self.weights().values()]

    def note_weights(self) -> None:
        """Note the weights, so that `changed` is False for them."""
        self.noted = self.bits()

    @property
    def changed(self) -> bool:
        """Whether the weights differ from those that were noted last."""
        return not all(map(torch.equal, self.noted, self.bits()))

    def current(self) -> Expected:
        """Return what to expect of the current weights. A copy that has changed follows its source."""
        expected = self.expected
        if self.changed and self.source is not None:
            expected = expected.clone()
            expected.follow(self.source)
        return expected

    def update(self) -> Expected:
        """Note the weights and what to expect of them, as the library does when the network is used."""
        self.expected = self.current()
        self.note_weights()
        return self.expected


Divide = Callable[[dict[str, Tensor], int, dict[str, int]], dict[str, int]]
"""Returns the zeros of each weight: the slow reference of an allocation."""


def prune(
    weights: dict[str, Tensor], zeros: int, guards: dict[str, int], pattern: str, divide: Divide | None = None
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the threshold and the mask of each weight, by sorting. By default all weights have one threshold.

    A pattern has no guards, and no other allocation.
    """
    if pattern != "elements":
        threshold, masks = pattern_twins.prune(weights, zeros, pattern_twins.TWINS[pattern][1])
        return dict.fromkeys(weights, threshold), masks
    already = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    free, remaining, thresholds = dict(weights), zeros, {}
    if divide is None:
        counts = already if sum(already.values()) > zeros else twins.greedy(weights, zeros, guards)
    else:
        given = divide(weights, zeros, guards)
        more = sum(already.values()) > zeros
        counts = {name: max(already[name], given[name]) if more else given[name] for name in weights}
        thresholds = {name: twins.threshold([weight], given[name]) for name, weight in weights.items()}
        free = {}
    while free:  # a weight that would lose more than its guard allows gets a threshold of its own
        t = twins.threshold(free.values(), remaining)
        pruned = iter(twins.zeros(free.values(), remaining))
        taken = {name: sum(next(pruned) for _ in range(weight.numel())) for name, weight in free.items()}
        over = {name for name in free if t and taken[name] > max(guards.get(name, taken[name]), already[name])}
        if not over:
            break
        for name in over:
            thresholds[name] = twins.threshold([free.pop(name)], counts[name])
            remaining -= counts[name]
    if free:
        thresholds |= dict.fromkeys(free, t)
    masks: dict[str, Tensor] = {}
    for name, weight in weights.items():
        values = twins.magnitudes([weight])
        ranked = sorted(range(len(values)), key=lambda i: values[i])
        mask = torch.ones(len(values), dtype=torch.bool)
        mask[ranked[: counts[name]]] = False
        masks[name] = mask.view(weight.shape)
    return thresholds, masks

"""Slow reference twins: each equation written down once more, value by value, in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction

import torch
from torch import Tensor, nn


def operator(weight: Tensor, threshold: float, p: float) -> Tensor:
    """P(w) = sign(w) (|w|^p - t^p)^(1/p) where |w| > t, else 0: as float64."""

    def one(w: float) -> float:
        magnitude = abs(w)
        if magnitude <= threshold:
            return 0.0
        if p == math.inf or threshold == 0.0:
            return w
        quotient = Fraction(threshold) / Fraction(magnitude)
        if float(p).is_integer():  # the difference in exact rational arithmetic: no cancellation
            ratio = float(1 - quotient ** int(p))
        elif quotient < Fraction(1, 2):
            ratio = 1.0 - float(quotient) ** p
        else:
            ratio = -math.expm1(p * math.log1p(float(quotient - 1)))
        return math.copysign(magnitude * ratio ** (1.0 / p), w)

    values = [one(w) for w in weight.detach().double().flatten().tolist()]
    return torch.tensor(values, dtype=torch.float64).view(weight.shape)


def slope(weight: Tensor, threshold: float, theta: float) -> Tensor:
    """The straight-through gradient: 1 where |w| > t, theta elsewhere."""
    values = [1.0 if abs(w) > threshold else theta for w in weight.detach().double().flatten().tolist()]
    return torch.tensor(values, dtype=torch.float64).view(weight.shape)


def magnitudes(weights: Iterable[Tensor]) -> list[float]:
    return [abs(value) for weight in weights for value in weight.detach().double().flatten().tolist()]


def threshold(weights: Iterable[Tensor], k: int) -> float:
    """The k-th smallest magnitude of all, 0 for k = 0: by sorting them."""
    return sorted(magnitudes(weights))[k - 1] if k else 0.0


def zeros(weights: Iterable[Tensor], k: int) -> list[bool]:
    """Which weights are pruned: the k smallest magnitudes, ties broken by position, and all that are 0 already."""
    values = magnitudes(weights)
    first = set(sorted(range(len(values)), key=lambda i: values[i])[:k])  # sorted() is stable
    return [i in first or value == 0.0 for i, value in enumerate(values)]


def rate(step: int, final_rate: float, start: int, end: int) -> float:
    """The cubic schedule."""
    if step < start:
        return 0.0
    if step >= end:
        return final_rate
    return final_rate * (1.0 - (1.0 - (step - start) / (end - start)) ** 3)


def count_zeros(tensors: Iterable[Tensor]) -> int:
    return sum(int((tensor == 0).sum()) for tensor in tensors)


def prunable(model: nn.Module, names: Callable[[str], bool] = lambda name: True) -> list[Tensor]:
    """The Conv and Linear weights of a plain model."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return [module.weight for name, module in model.named_modules() if isinstance(module, kinds) and names(name)]


def greedy(weights: dict[str, Tensor], k: int, caps: dict[str, int]) -> dict[str, int]:
    """Zeros by tensor: by magnitude, then position, each weight whose tensor is not at its cap, until k are pruned.

    A weight that is zero is pruned whatever the cap.
    """
    order = [
        (abs(value), i, name)
        for i, (name, value) in enumerate(
            (name, value) for name, weight in weights.items() for value in weight.flatten().tolist()
        )
    ]
    zeros = dict.fromkeys(weights, 0)
    for magnitude, _, name in sorted(order):
        if sum(zeros.values()) < k and (magnitude == 0 or zeros[name] < caps.get(name, weights[name].numel())):
            zeros[name] += 1
    return zeros

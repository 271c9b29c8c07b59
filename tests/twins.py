"""Slow reference implementations: each equation once more, element by element, in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction

import torch
from torch import Tensor, nn


def operator(weight: Tensor, threshold: float, p: float) -> Tensor:
    """Return P(w) = sign(w) (|w|^p - t^p)^(1/p) where |w| > t, else 0, as float64."""

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
    """Return the straight-through gradient: 1 where |w| > t, theta elsewhere."""
    values = [1.0 if abs(w) > threshold else theta for w in weight.detach().double().flatten().tolist()]
    return torch.tensor(values, dtype=torch.float64).view(weight.shape)


def magnitudes(weights: Iterable[Tensor]) -> list[float]:
    """Return the magnitudes of all elements, in order."""
    return [abs(value) for weight in weights for value in weight.detach().double().flatten().tolist()]


def threshold(weights: Iterable[Tensor], k: int) -> float:
    """Return the k-th smallest magnitude of all, by sorting; 0 for k = 0."""
    return sorted(magnitudes(weights))[k - 1] if k else 0.0


def zeros(weights: Iterable[Tensor], k: int) -> list[bool]:
    """Return which elements are pruned: the k smallest magnitudes, ties broken by position, and all zeros."""
    values = magnitudes(weights)
    first = set(sorted(range(len(values)), key=lambda i: values[i])[:k])  # sorted() is stable
    return [i in first or value == 0.0 for i, value in enumerate(values)]


def rate(step: int, final_rate: float, start: int, end: int) -> float:
    """Return the rate of the cubic schedule."""
    if step < start:
        return 0.0
    if step >= end:
        return final_rate
    return final_rate * (1.0 - (1.0 - (step - start) / (end - start)) ** 3)


def count_zeros(tensors: Iterable[Tensor]) -> int:
    """Return the number of zeros in all tensors together."""
    return sum(int((tensor == 0).sum()) for tensor in tensors)


def prunable(model: nn.Module, names: Callable[[str], bool] = lambda name: True) -> list[Tensor]:
    """Return the Conv and Linear weights of a model, as a forward pass uses them."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return [module.weight for name, module in model.named_modules() if isinstance(module, kinds) and names(name)]


def survivors_of_outputs(layer: nn.Module, x: Tensor, dim: int, weight: Tensor) -> list[int]:
    """Return the number of survivors that each output depends on, found by its gradient.

    Args:
        layer: a plain layer.
        x: inputs, without negative numbers, so that no gradient cancels.
        dim: dimension of the outputs in the result of the layer.
        weight: the weight with zeros.
    """
    leaf = torch.ones_like(weight, requires_grad=True)
    out = torch.func.functional_call(layer, {"weight": leaf}, (x,))
    counts: list[int] = []
    for output in out.unbind(dim):
        (gradient,) = torch.autograd.grad(output.sum(), leaf, retain_graph=True)
        counts.append(int(((gradient != 0) & (weight != 0)).sum()))
    return counts


def greedy(weights: dict[str, Tensor], k: int, guards: dict[str, int]) -> dict[str, int]:
    """Return the zeros of each weight, by the greedy rule of `allocations.global_magnitude`.

    Visit all elements by magnitude, then position. Prune each one whose weight is below its guard, until k are pruned.
    An element that is zero is pruned in any case.
    """
    order = [
        (abs(value), i, name)
        for i, (name, value) in enumerate(
            (name, value) for name, weight in weights.items() for value in weight.flatten().tolist()
        )
    ]
    zeros = dict.fromkeys(weights, 0)
    for magnitude, _, name in sorted(order):
        if sum(zeros.values()) < k and (magnitude == 0 or zeros[name] < guards.get(name, weights[name].numel())):
            zeros[name] += 1
    return zeros


def ham_step(
    weights: list[list[float]], gradients: list[list[float]], lr: float, alpha: float, beta: float
) -> list[list[float]]:
    """Return w * exp(lr * (-alpha * sign(w) * g - beta)) of each weight (HAM's mirror step, arXiv 2506.02630)."""

    def step(w: float, g: float) -> float:
        sign = (w > 0) - (w < 0)
        return w * math.exp(lr * (-alpha * sign * g - beta))

    return [[step(w, g) for w, g in zip(*rows, strict=True)] for rows in zip(weights, gradients, strict=True)]


def split(total: int, ratios: Mapping[str, float], least: dict[str, int], most: dict[str, int]) -> dict[str, int]:
    """Return parts in proportion to ratios: each starts at its least value, and the one that is due grows by one.

    A part x is due at the number c for which c * ratio is x + 1/2.
    """
    parts = dict(least)
    while sum(parts.values()) < total:
        growing = [name for name in parts if parts[name] < most[name] and ratios[name]]
        due = {name: (parts[name] + Fraction(1, 2)) / Fraction(ratios[name]) for name in growing}
        parts[min(due, key=lambda name: due[name])] += 1  # the first of several
    return parts


def survivors(
    weights: dict[str, Tensor], k: int, guards: dict[str, int], ratios: Mapping[str, float]
) -> dict[str, int]:
    """Return the zeros of each weight if its survivors are in proportion to ratios."""
    sizes = {name: weight.numel() for name, weight in weights.items()}
    least = {name: size - guards.get(name, size) for name, size in sizes.items()}
    kept = split(sum(sizes.values()) - k, ratios, least, sizes)
    return {name: sizes[name] - kept[name] for name in sizes}


def erk(weights: dict[str, Tensor], k: int, guards: dict[str, int]) -> dict[str, int]:
    """Return the zeros of each weight by `allocations.erk`."""
    return survivors(weights, k, guards, {name: sum(weight.shape) for name, weight in weights.items()})


def square_root(weights: dict[str, Tensor], k: int, guards: dict[str, int]) -> dict[str, int]:
    """Return the zeros of each weight by `allocations.square_root`."""
    return survivors(weights, k, guards, {name: math.sqrt(weight.numel()) for name, weight in weights.items()})


def uniform(weights: dict[str, Tensor], k: int, guards: dict[str, int]) -> dict[str, int]:
    """Return the zeros of each weight by `allocations.uniform`."""
    sizes = {name: weight.numel() for name, weight in weights.items()}
    return split(k, sizes, dict.fromkeys(sizes, 0), {name: guards.get(name, size) for name, size in sizes.items()})


def lamp(weights: dict[str, Tensor], k: int, guards: dict[str, int]) -> dict[str, int]:
    """Return the zeros of each weight by `allocations.lamp`."""
    scores: dict[str, Tensor] = {}
    for name, weight in weights.items():
        values = sorted(magnitudes([weight]))
        sums = [sum(value**2 for value in values[i:]) for i in range(len(values))]
        scores[name] = torch.tensor(
            [v**2 / s if v else 0.0 for v, s in zip(values, sums, strict=True)], dtype=torch.float64
        )
    return greedy(scores, k, guards)


def normalised(weights: dict[str, Tensor], k: int, guards: dict[str, int]) -> dict[str, int]:
    """Return the zeros of each weight by `allocations.normalised`, whose deviations have four digits."""
    scores: dict[str, Tensor] = {}
    for name, weight in weights.items():
        values = magnitudes([weight])
        deviation = float(f"{math.sqrt(sum(value**2 for value in values) / max(1, len(values))):.4g}")
        scores[name] = torch.tensor([value / (deviation or 1.0) for value in values], dtype=torch.float64)
    return greedy(scores, k, guards)

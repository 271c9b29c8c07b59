"""Slow references of patterns: units as lists of elements, ranked by sorting."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from feather_param import patterns
from feather_param.patterns import Pattern
from tests import twins


class Unit(NamedTuple):
    """Elements of a weight that are pruned together."""

    elements: list[int]  # their positions in the flattened weight
    magnitude: float


Twin = Callable[[Tensor], list[Unit]]


def values_of(weight: Tensor) -> list[float]:
    return weight.detach().double().flatten().tolist()


def elements(weight: Tensor) -> list[Unit]:
    return [Unit([i], abs(value)) for i, value in enumerate(values_of(weight))]


def blocks(rows: int, columns: int) -> Twin:
    """Return the blocks of a weight, with the root mean square rounded to the precision of a threshold."""

    def units(weight: Tensor) -> list[Unit]:
        values, height, width = values_of(weight), weight.shape[0], math.prod(weight.shape[1:])
        found = []
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                at = [(top + i) * width + left + j for i in range(rows) for j in range(columns)]
                power = math.frexp(max(abs(values[i]) for i in at))[1]  # so that no square underflows
                squares = [math.ldexp(values[i], -power) ** 2 for i in at]
                root = math.ldexp(math.sqrt(math.fsum(squares) / len(at)), power)
                found.append(Unit(at, root if weight.dtype == torch.float64 else torch.tensor(root).item()))
        return found

    return units


def n_m(n: int, m: int) -> Twin:
    """Return the m - n smallest elements of each group, each as a unit."""

    def units(weight: Tensor) -> list[Unit]:
        values, inner = values_of(weight), math.prod(weight.shape[2:])
        found = []
        for output in range(weight.shape[0]):
            for first in range(0, weight.shape[1], m):
                ranked = []  # of each kernel position
                for position in range(inner):
                    at = [(output * weight.shape[1] + first + i) * inner + position for i in range(m)]
                    ranked.append(sorted(at, key=lambda i: abs(values[i]))[: m - n])
                found += [Unit([own[rank]], abs(values[own[rank]])) for rank in range(m - n) for own in ranked]
        return found

    return units


TWINS: dict[str, tuple[Pattern, Twin]] = {
    "elements": (patterns.elements, elements),
    "blocks(1, 2)": (patterns.blocks(1, 2), blocks(1, 2)),
    "blocks(1, 4)": (patterns.blocks(1, 4), blocks(1, 4)),
    "blocks(4, 1)": (patterns.blocks(4, 1), blocks(4, 1)),
    "blocks(2, 3)": (patterns.blocks(2, 3), blocks(2, 3)),
    "n_m(2, 4)": (patterns.n_m(2, 4), n_m(2, 4)),
    "n_m(1, 4)": (patterns.n_m(1, 4), n_m(1, 4)),
    "n_m(4, 8)": (patterns.n_m(4, 8), n_m(4, 8)),
    "n_m(1, 2)": (patterns.n_m(1, 2), n_m(1, 2)),
    "n_m(1, 3)": (patterns.n_m(1, 3), n_m(1, 3)),
}


def prune(weights: dict[str, Tensor], zeros: int, twin: Twin) -> tuple[float, dict[str, Tensor]]:
    """Return the threshold and the masks: the smallest units are pruned, up to a number of zeros.

    Equal units are pruned in order. If the threshold is zero, all zeros are pruned.
    """
    units = [(name, unit) for name, weight in weights.items() for unit in twin(weight)]
    units.sort(key=lambda each: each[1].magnitude)  # stable
    pruned = units[: zeros // len(units[0][1].elements)]
    threshold = pruned[-1][1].magnitude if pruned else 0.0
    masks: dict[str, Tensor] = {}
    for name, weight in weights.items():
        mask = torch.ones(weight.numel(), dtype=torch.bool)
        for unit in (unit for own, unit in pruned if own == name):
            mask[unit.elements] = False
        masks[name] = mask.view(weight.shape) & ((weight != 0) if threshold == 0 else True)
    return threshold, masks


def used(weight: Tensor, threshold: float, p: float, pattern: Pattern, twin: Twin) -> tuple[Tensor, Tensor]:
    """Return P(w) as float64, and which elements are pruned, by the equations in the docstrings of `patterns`."""
    values = values_of(weight)
    pairs = [(abs(value), -1.0) for value in values]  # of each element: its magnitude and threshold
    if repr(pattern).startswith("n_m"):
        m, inner = pattern.m, math.prod(weight.shape[2:])  # type: ignore[attr-defined]
        limits: dict[tuple[int, int, int], float] = {}  # of each group: the largest magnitude that may be pruned
        where = [
            (i // inner // weight.shape[1], i // inner % weight.shape[1] // m, i % inner) for i in range(len(values))
        ]
        for unit in twin(weight):
            group = where[unit.elements[0]]
            limits[group] = max(limits.get(group, 0.0), unit.magnitude)
        pairs = [(abs(value), min(threshold, limits[group])) for value, group in zip(values, where, strict=True)]
    else:
        for unit in twin(weight):
            for i in unit.elements:
                pairs[i] = unit.magnitude, threshold
    pruned = [magnitude <= limit for magnitude, limit in pairs]
    result = [
        value * factor(magnitude, limit, p) if not gone else 0.0
        for value, (magnitude, limit), gone in zip(values, pairs, pruned, strict=True)
    ]
    return torch.tensor(result, dtype=torch.float64).view(weight.shape), torch.tensor(pruned).view(weight.shape)


def factor(magnitude: float, threshold: float, p: float) -> float:
    """Return (1 - (t/m)^p)^(1/p)."""
    return twins.operator(torch.tensor(magnitude, dtype=torch.float64), threshold, p).item() / magnitude

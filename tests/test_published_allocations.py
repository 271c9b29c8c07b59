"""Published numbers of allocations: the ERK densities of ResNet-50."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import feather_param
from feather_param import allocations


@pytest.fixture(scope="module")
def uses() -> dict[str, tuple[int, int]]:
    """Return the size of each weight of ResNet-50, and the multiplications of each of its elements, by name."""
    model = pytest.importorskip("torchvision").models.resnet50()
    counted = feather_param.reports.multiply_adds(model, torch.zeros(1, 3, 224, 224)).rows
    return {row.name: (model.get_parameter(row.name).numel(), row.uses) for row in counted}


def resnet50() -> nn.Module:
    with torch.device("meta"):
        return pytest.importorskip("torchvision").models.resnet50()


# "Inference FLOPs" of github.com/google-research/rigl, whose layers are all pruned by ERK. "Uniform" leaves the first
# layer dense. Both count operations without weights as well. We assume that these are 0.3 % of the dense network: any
# number from 0.23 % to 0.38 % explains all of these fractions.
OTHER = 0.003
PUBLISHED = [("erk", 0.8, 0.42), ("erk", 0.9, 0.24), ("erk", 0.95, 0.12), ("erk", 0.965, 0.09)]
PUBLISHED += [("uniform", 0.8, 0.23), ("uniform", 0.9, 0.13), ("uniform", 0.95, 0.08), ("uniform", 0.965, 0.07)]


@pytest.mark.parametrize(("name", "rate", "fraction"), PUBLISHED)
def test_the_multiply_adds_of_resnet50_are_the_published_ones(uses, name, rate, fraction):
    exclude = "conv1" if name == "uniform" else None
    rows = feather_param.plan(resnet50(), final_rate=rate, allocation=getattr(allocations, name), exclude=exclude).rows
    survivors = {n: size for n, (size, _) in uses.items()} | {row.name: row.total - row.zeros for row in rows}
    remaining = sum(survivors[n] * times for n, (_, times) in uses.items())
    dense = sum(size * times for size, times in uses.values())
    assert round((remaining / dense + OTHER) / (1 + OTHER), 2) == fraction


def densities(shapes: dict[str, torch.Size], rate: float) -> dict[str, float]:
    """Return the densities by the algorithm of RigL: layers above the density 1 are dense, one after the other."""
    dense: set[str] = set()
    while True:
        sparse = {name: shape for name, shape in shapes.items() if name not in dense}
        kept = (1 - rate) * sum(shape.numel() for shape in shapes.values()) - sum(shapes[n].numel() for n in dense)
        epsilon = kept / sum(sum(shape) for shape in sparse.values())
        found = {name: epsilon * sum(shape) / shape.numel() for name, shape in sparse.items()}
        above = {name for name, density in found.items() if density > 1}
        if not above:
            return found | dict.fromkeys(dense, 1.0)
        dense |= {max(above, key=lambda name: found[name])}


@pytest.mark.parametrize("rate", [0.8, 0.9])
def test_erk_gives_resnet50_the_densities_of_the_algorithm_of_rigl(rate):
    model = resnet50()
    rows = feather_param.plan(model, final_rate=rate, allocation=allocations.erk).rows
    expected = densities({row.name: torch.Size(row.shape) for row in rows}, rate)
    assert len(rows) == 54
    dimensions = sum(sum(row.shape) for row in rows if expected[row.name] < 1)
    for row in rows:
        # A part is rounded by at most 1/2, and c changes so that the rounded parts have the same sum.
        tolerance = 0.5 + 0.5 * len(rows) * sum(row.shape) / dimensions
        assert abs(row.total - row.zeros - expected[row.name] * row.total) <= tolerance, row.name

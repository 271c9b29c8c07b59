"""Patterns and allocations together: each may be chosen without the other changing its meaning."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import feather_param
from feather_param import allocations, patterns
from tests.training import zeros_in

ALLOCATIONS = {
    "global_magnitude": allocations.global_magnitude,
    "uniform": allocations.uniform,
    "erk": allocations.erk,
    "square_root": allocations.square_root,
    "lamp": allocations.lamp,
    "normalised": allocations.normalised,
    "per_layer": allocations.per_layer({"0": 0.3, "*": 0.7}),
    "from_plan": allocations.from_plan({"0.weight": 700, "2.weight": 500, "5.weight": 600}),
    "outputs": allocations.in_proportion(lambda name, weight: weight.shape[0]),
}
BY_SHAPE = ["uniform", "erk", "square_root", "per_layer", "from_plan", "outputs"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 64, 1)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.ReLU(), nn.Linear(64, 16))


def sparsified(**arguments) -> tuple[nn.Sequential, feather_param.Controller]:
    model = net()
    return model, feather_param.sparsify(model, total_steps=1, end_step=0, **arguments)


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_blocks_of_one_element_are_elements(name):
    _, controller = sparsified(final_rate=0.5, allocation=ALLOCATIONS[name])
    _, blocks = sparsified(final_rate=0.5, allocation=ALLOCATIONS[name], pattern=patterns.blocks(1, 1))
    expected = controller.masks()
    assert all(torch.equal(mask, expected[weight]) for weight, mask in blocks.masks().items())


@pytest.mark.parametrize("pattern", [patterns.blocks(4, 1), patterns.blocks(1, 4), patterns.n_m(1, 4)], ids=str)
@pytest.mark.parametrize("name", BY_SHAPE)
def test_an_allocation_by_shapes_means_the_weights_and_not_the_units(name, pattern):
    arguments = {"final_rate": 0.5, "allocation": ALLOCATIONS[name], "max_rate_per_layer": 0.75}
    rows = {row.name: row.zeros for row in feather_param.plan(net(), **arguments).rows}
    found = {row.name: row.zeros for row in feather_param.plan(net(), pattern=pattern, **arguments).rows}
    for (
        weight,
        zeros,
    ) in rows.items():  # up to the rounding to units of up to 4 elements, of each weight and of the total
        assert abs(found[weight] - zeros) <= 8, weight


@pytest.mark.filterwarnings("ignore:nothing survives")
@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("pattern", [None, patterns.blocks(1, 4), patterns.n_m(2, 4)], ids=str)
def test_the_total_is_exact_if_a_layer_is_zero_already(name, pattern):
    model = net()
    nn.init.zeros_(model[5].weight)  # 1,024 of 4,352 elements; its allocation may give it fewer zeros
    arguments = {"final_rate": 0.45, "total_steps": 1, "end_step": 0}
    controller = feather_param.sparsify(model, allocation=ALLOCATIONS[name], pattern=pattern, **arguments)
    k = round(0.45 * 4352)
    k -= k % (4 if pattern is not None and pattern.size == 4 else 1)
    assert controller.report().zeros == k
    controller.desparsify()
    assert zeros_in(model) == k


def test_survivors_are_counted_with_the_threshold_of_the_dtype_of_the_weight():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[0.1, 0.2, 3, 4], [1.1, 5, 6, 7], [0.3, 0.4, 8, 9], [1.1, 9, 9, 9]]))
        second.weight.copy_(torch.tensor([[first.weight[1, 0].double() - 1e-9, 8, 8, 8]]))
    model = nn.Sequential(first, second)
    controller = feather_param.sparsify(
        model, final_rate=0.25, total_steps=1, end_step=0, pattern=patterns.blocks(1, 1)
    )
    counted = {name: int(count) for name, count in controller._shared.survivors().items()}
    assert counted == {row.name: row.survivors for row in controller.report().rows}


@pytest.mark.parametrize("pattern", [patterns.blocks(1, 4), patterns.n_m(2, 4)], ids=str)
def test_a_frozen_weight_keeps_its_memory_format(pattern):
    model = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0, pattern=pattern)
    before = model.weight.stride()
    controller.freeze()
    assert model.weight.stride() == before


@pytest.mark.parametrize("pattern", [patterns.blocks(1, 4), patterns.n_m(2, 4)], ids=str)
def test_pruned_elements_are_positive_zeros(pattern):
    model, _ = sparsified(final_rate=0.5, pattern=pattern)
    zeros = model[5].weight[model[5].weight == 0]
    assert len(zeros)
    assert not torch.signbit(zeros).any()


def test_a_rate_that_prunes_no_unit_is_refused():
    with pytest.raises(
        ValueError, match=r"expected a final_rate that prunes a unit of 64 elements, got 0.9 of 64 weig"
    ):
        feather_param.sparsify(nn.Linear(8, 8), final_rate=0.9, total_steps=1, pattern=patterns.blocks(8, 8))


def test_reports_and_plans_name_the_allocation_and_the_pattern():
    arguments = {"final_rate": 0.5, "allocation": allocations.erk, "pattern": patterns.n_m(2, 4)}
    for text in (str(sparsified(**arguments)[1].report()), str(feather_param.plan(net(), **arguments))):
        assert "allocation: erk" in text
        assert "pattern: n_m(2, 4)" in text

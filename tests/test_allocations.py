"""Allocations: each divides the zeros by its formula, and the total is exact."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import feather_param
from feather_param import allocations, schedules
from feather_param.allocations import from_plan, global_magnitude, in_proportion, per_layer
from feather_param.ops.groups import count_zeros, masks
from tests import twins
from tests.network import WEIGHTS, net, train_step
from tests.training import zeros_in

VALUES = st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.0, 1.5, 2.0, -3.0, 7.0])


@given(
    tensors=st.lists(st.lists(VALUES, min_size=1, max_size=8), min_size=1, max_size=5),
    data=st.data(),
)
@settings(max_examples=300)
def test_global_magnitude_equals_the_greedy_rule(tensors, data):
    weights = {str(i): torch.tensor(values) for i, values in enumerate(tensors)}
    guards = {
        name: data.draw(st.integers(0, weight.numel() - 1))
        for name, weight in weights.items()
        if data.draw(st.booleans())
    }
    most = sum(guards.get(name, weight.numel()) for name, weight in weights.items())
    k = data.draw(st.integers(0, most))
    groups = global_magnitude(weights, k, guards)
    counts = count_zeros(weights, groups)
    natural = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    expected = natural if sum(natural.values()) > k else twins.greedy(weights, k, guards)
    assert {name: count.zeros for name, count in counts.items()} == expected
    assert sum(group.zeros for group in groups) == k
    for group in groups:  # the forward pass prunes by the threshold: the same elements, except for ties
        for name in group.names:
            below = int((weights[name].abs() < group.threshold).sum())
            assert below <= counts[name].zeros <= int((weights[name].abs() <= group.threshold).sum())


BY_SHAPE = {"uniform": twins.uniform, "erk": twins.erk, "square_root": twins.square_root}
BY_VALUE = {"lamp": twins.lamp, "normalised": twins.normalised, "global_magnitude": twins.greedy}


def weights_like_a_network(dtype: torch.dtype, kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv": (6, 2, 3, 3), "depthwise": (6, 1, 3, 3), "fc": (5, 12), "head": (2, 5)}
    weights = {}
    for spread, (name, shape) in enumerate(shapes.items(), start=1):
        weight = torch.randn(shape, generator=generator) * 0.1 * spread
        if kind == "ties":
            weight = weight.mul(8).round().div(8)
        if kind == "zeros":
            weight = torch.where(torch.rand(shape, generator=generator) < 0.2, 0.0, weight)
        weights[name] = weight.to(dtype)
    return weights


GUARDS = {"none": {}, "some": {"depthwise": 20, "head": 3}, "all": {"conv": 90, "depthwise": 40, "fc": 50, "head": 9}}


@pytest.mark.parametrize("guards", GUARDS.values(), ids=GUARDS)
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*BY_SHAPE, *BY_VALUE])
def test_an_allocation_equals_its_twin_for_every_number_of_zeros(name, dtype, kind, guards):
    weights = weights_like_a_network(dtype, kind)
    sizes = {n: weight.numel() for n, weight in weights.items()}
    natural = {n: int((weight == 0).sum()) for n, weight in weights.items()}
    most = sum(guards.get(n, size) for n, size in sizes.items())
    for zeros in [*range(0, most, 13), most - 1, most]:
        groups = getattr(allocations, name)(weights, zeros, guards)
        assert sum(group.zeros for group in groups) == zeros
        assert sorted(n for group in groups for n in group.names) == sorted(weights)
        counts = {n: count.zeros for n, count in count_zeros(weights, groups).items()}
        found = masks(weights, groups)
        assert counts == {n: int((~found[n]).sum()) for n in weights}
        if name in BY_SHAPE:
            given = BY_SHAPE[name](weights, zeros, guards)
            assert {group.names[0]: group.zeros for group in groups} == given
            more = sum(natural.values()) > zeros
            assert counts == {n: max(given[n], natural[n]) if more else given[n] for n in weights}
            for group in groups:
                assert float(group.threshold) == twins.threshold([weights[group.names[0]]], group.zeros)
        elif sum(natural.values()) <= zeros:
            assert counts == BY_VALUE[name](weights, zeros, guards)
            assert sum(counts.values()) == zeros
        assert sum(counts.values()) == zeros or sum(natural.values()) > zeros
        assert all(counts[n] <= max(guards.get(n, sizes[n]), natural[n]) for n in weights)


@pytest.mark.parametrize("name", BY_SHAPE)
def test_no_weight_loses_zeros_when_there_are_more_in_all(name):
    weights = weights_like_a_network(torch.float32, "normal")
    before = dict.fromkeys(weights, 0)
    for zeros in range(sum(weight.numel() for weight in weights.values())):
        now = (
            {group.names[0]: group.zeros for group in getattr(allocations, name)(weights, zeros, {"fc": 40})}
            if zeros <= 222 - 20
            else before
        )
        assert all(now[n] >= before[n] for n in weights)
        before = now


def test_lamp_leaves_each_weight_an_element_before_it_prunes_one_as_a_whole():
    weights = weights_like_a_network(torch.float32, "normal")
    weights["head"] *= 1e-6
    total = sum(weight.numel() for weight in weights.values())
    counts = count_zeros(weights, allocations.lamp(weights, total - len(weights), {}))
    assert [weight.numel() - counts[n].zeros for n, weight in weights.items()] == [1, 1, 1, 1]


def test_normalised_does_not_depend_on_the_scales_of_the_weights():
    weights = weights_like_a_network(torch.float32, "normal")
    groups = allocations.normalised(weights, 150, {})
    scaled = {n: weight * 2.0 ** (20 * i) for i, (n, weight) in enumerate(weights.items())}
    assert [g.zeros for g in allocations.normalised(scaled, 150, {})] == [g.zeros for g in groups]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", [*BY_SHAPE, *BY_VALUE])
@pytest.mark.parametrize("zeros", [0, 100])
def test_an_allocation_refuses_nan_and_infinity(name, bad, zeros):
    weights = weights_like_a_network(torch.float32, "normal")
    weights["fc"][0, 0] = bad
    with pytest.raises(ValueError, match="expected finite weights, got NaN or infinity in fc; "):
        getattr(allocations, name)(weights, zeros, {})


# -- in training ------------------------------------------------------------------------------------------------------

ALL = {
    **{name: getattr(allocations, name) for name in [*BY_SHAPE, *BY_VALUE]},
    "in_proportion": in_proportion(lambda name, weight: weight.shape[0]),
    "by value": in_proportion(lambda name, weight: float(weight.square().mean()) + 1e-3),
    "per_layer": per_layer({"0": 0.3, "4.weight": 0.0, "*": 0.95}),
    "from_plan": from_plan({"0.weight": 100, "3.weight": 1900, "4.weight": 9}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_the_total_is_exact_at_every_step_of_the_schedule(name, dtype):
    model = net().to(dtype)
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=8, allocation=ALL[name])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 3, 6, 6, dtype=dtype)
    for _ in range(8):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        controller.step()
        report = controller.report()
        assert report.zeros == round(controller.rate * WEIGHTS)
        for row in report.rows:  # the network that is evaluated is the one that is reported
            used = model.get_submodule(row.name.removesuffix(".weight")).weight
            assert int((used == 0).sum()) == row.zeros + row.ties
    rows = report.rows
    controller.desparsify()
    assert [int((model.get_parameter(row.name) == 0).sum()) for row in rows] == [row.zeros for row in rows]
    assert zeros_in(model) == round(0.9 * WEIGHTS)


@pytest.mark.parametrize("name", ALL)
def test_a_run_resumes_bit_for_bit(name):
    def run(steps, state=None):
        model = net()
        controller = feather_param.sparsify(model, final_rate=0.9, total_steps=8, allocation=ALL[name])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        parts = {"model": model, "controller": controller, "optimizer": optimizer}
        for key, value in (state or {}).items():
            parts[key].load_state_dict(value)
        for step in steps:
            train_step(model, optimizer, step)
            controller.step()
        return {key: part.state_dict() for key, part in parts.items()}, feather_param.baked_state_dict(model)

    _, whole = run(range(8))
    saved, _ = run(range(3))
    _, resumed = run(range(3, 8), saved)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


@pytest.mark.parametrize("name", ALL)
def test_a_frozen_run_finds_its_masks_again(name):
    def sparsified():
        model = net()
        return model, feather_param.sparsify(model, final_rate=0.9, total_steps=4, end_step=0, allocation=ALL[name])

    model, controller = sparsified()
    controller.freeze()
    other, resumed = sparsified()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(controller.state_dict())
    assert all(torch.equal(mask, resumed.masks()[key]) for key, mask in controller.masks().items())
    assert resumed.report().zeros == round(0.9 * WEIGHTS)


@pytest.mark.parametrize("name", [name for name in ALL if name != "by value"])
def test_a_model_on_the_meta_device_gets_its_zeros_when_it_is_loaded(name):
    arguments = {"final_rate": 0.9, "total_steps": 4, "end_step": 0, "allocation": ALL[name]}
    with torch.device("meta"):
        model = net(None)
    controller = feather_param.sparsify(model, **arguments)
    loaded, expected = net(), feather_param.sparsify(net(), **arguments)
    model.load_state_dict(loaded.state_dict(), assign=True)
    assert [row.zeros for row in controller.report().rows] == [row.zeros for row in expected.report().rows]
    assert torch.equal(controller.threshold, expected.threshold)


def test_a_plan_equals_the_report_and_its_zeros_can_be_used_again():
    arguments = {"final_rate": 0.9, "max_rate_per_layer": 0.92, "allocation": allocations.normalised}
    plan = feather_param.plan(net(), **arguments)
    report = feather_param.sparsify(net(), total_steps=1, schedule=schedules.constant, **arguments).report()
    assert [row.zeros for row in plan.rows] == [row.zeros for row in report.rows]
    for source in (plan, report, {row.name: row.zeros for row in report.rows}):
        again = feather_param.plan(net(1), final_rate=0.9, allocation=from_plan(source))
        assert [row.zeros for row in again.rows] == [row.zeros for row in report.rows]


def test_a_rate_of_zero_keeps_a_weight_dense_and_the_first_glob_counts():
    rates = {"0.*": 0.5, "4": 0.0, "*": 0.95}
    rows = feather_param.plan(net(), final_rate=0.9, allocation=per_layer(rates)).rows
    sizes = {"0.weight": 216, "3.weight": 2048, "4.weight": 64}
    numbers = {"0.weight": 0.5 * 216, "3.weight": 0.95 * 2048, "4.weight": 0.0}
    expected = twins.split(round(0.9 * WEIGHTS), numbers, dict.fromkeys(sizes, 0), sizes)
    assert {row.name: row.zeros for row in rows} == expected
    assert expected["4.weight"] == 0


def test_the_largest_threshold_is_the_controllers():
    controller = feather_param.sparsify(
        net(), final_rate=0.5, total_steps=1, end_step=0, allocation=allocations.uniform
    )
    groups = controller._shared.position.groups
    assert controller.threshold == max(group.threshold for group in groups)
    assert len({float(group.threshold) for group in groups}) == 3


def test_a_plan_is_followed_by_its_zeros_below_and_by_its_survivors_above():
    weights = {"a": torch.randn(100), "b": torch.randn(200), "dense": torch.randn(50)}
    allocation = allocations.from_plan({"a": 60, "b": 180, "dense": 0})

    def zeros(total):
        return [group.zeros for group in allocation(weights, total, {})]

    assert zeros(120) == [30, 90, 0]
    assert zeros(240) == [60, 180, 0]  # as listed
    assert zeros(270) == [80, 190, 0]  # half of the listed survivors, 40 and 20
    assert zeros(300) == [100, 200, 0]
    with pytest.raises(
        ValueError, match=r"room for 301 zeros, got one in which the weights that are not dense can have 300"
    ):
        zeros(301)
    by_step = [zeros(total) for total in range(301)]
    assert all(a <= b for one, more in pairwise(by_step) for a, b in zip(one, more, strict=True))

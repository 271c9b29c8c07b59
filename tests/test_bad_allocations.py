"""Allocations that do not fit a model, their arguments, and saved states of another one."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import feather_param
from feather_param import allocations, patterns
from feather_param.allocations import Group, from_plan, global_magnitude, in_proportion, per_layer
from tests.network import net


def first_only(weights, zeros, guards):
    return allocations.group_each({"0.weight": weights["0.weight"]}, {"0.weight": 0})


def one_zero_too_few(weights, zeros, guards):
    return global_magnitude(weights, zeros - 1, guards)


def wrong_threshold(weights, zeros, guards):
    return [allocations.Group(tuple(weights), zeros, torch.tensor(1e-3))]


def unguarded(weights, zeros, guards):
    return global_magnitude(weights, zeros, {})


def other_weight(weights, zeros, guards):
    return [*global_magnitude(weights, zeros, guards), allocations.Group(("5.weight",), 0, torch.zeros(()))]


def too_many(weights, zeros, guards):
    t = torch.zeros(())
    sizes = {"0.weight": 217, "3.weight": zeros - 217, "4.weight": 0}
    return [allocations.Group((name,), size, t) for name, size in sizes.items()]


REFUSED = [
    ("erk", TypeError, "allocation to be a function (weights, zeros, guards) -> groups, got str; use one of"),
    (lambda *_: {}, TypeError, "the allocation <lambda> to return a list of Group, got dict; end it with group_each"),
    (lambda *_: [1], TypeError, "the allocation <lambda> to return a list of Group, got a list of int"),
    (first_only, ValueError, "the allocation first_only to put each weight in one group, got 3.weight in 0"),
    (one_zero_too_few, ValueError, "one_zero_too_few to give 2095 zeros to all weights together, got 2094"),
    (wrong_threshold, ValueError, "to return the 2095-th smallest magnitude of 0.weight, 3.weight, 4.weight as the th"),
    (unguarded, ValueError, "the allocation unguarded to give 3.weight at most 1884 zeros, its guard, got"),
    (other_weight, ValueError, "other_weight to return the weights that it got, got 5.weight as well"),
    (too_many, ValueError, "the allocation too_many to give 0.weight from 0 to 216 zeros, got 217"),
    (
        in_proportion(lambda name, weight: 0),
        ValueError,
        "the number for a weight to be finite and > 0, got 0.0 for 0.w",
    ),
    (in_proportion(lambda name, weight: "1"), TypeError, "the number for a weight to be a number, got '1'"),
    (per_layer({"0": 0.5}), ValueError, 'a rate for each weight, got none for 3.weight; add "*" as the last glob'),
    (per_layer({"5": 0.5, "*": 0.9}), ValueError, "each glob of per_layer to determine the rate of a weight, got '5'"),
    (per_layer({"*": 0.9, "0": 0.5}), ValueError, "got '0', which matches only 0.weight, whose rate an"),
    (per_layer({"3": 0.0, "*": 0.9}), ValueError, "an allocation with room for 2,095 zeros, got one in which the weig"),
    (from_plan({"0.weight": 3}), ValueError, "of this model, got 3.weight, which is not in the plan; make the plan"),
    (
        from_plan({"0.weight": 1, "3.weight": 1, "4.weight": 1, "5.weight": 1}),
        ValueError,
        "got 5.weight, which is not in the weights of the model; make the plan with the same include and exclude",
    ),
]


@pytest.mark.parametrize(("allocation", "error", "message"), REFUSED)
def test_sparsify_refuses_an_allocation_before_it_touches_the_model(allocation, error, message):
    model = net()
    with pytest.raises(error, match="expected .*" + re.escape(message)):
        feather_param.sparsify(model, final_rate=0.9, total_steps=4, allocation=allocation, max_rate_per_layer=0.92)
    assert [type(layer) for layer in model] == [type(layer) for layer in net()]


@pytest.mark.parametrize(
    ("make", "argument", "error", "message"),
    [
        (in_proportion, 3, TypeError, "a function (name, weight) -> number, got int"),
        (per_layer, 0.9, TypeError, "a mapping from globs to rates, got 0.9"),
        (per_layer, {3: 0.9}, TypeError, "a mapping from globs to rates, got {3: 0.9}"),
        (per_layer, {}, ValueError, 'at least one rate, got none; "*" matches all weights'),
        (per_layer, {"*": "1"}, TypeError, "the rate of '*' to be a number, got '1'"),
        (per_layer, {"*": 1.0}, ValueError, "a rate, the fraction of zeros, in [0, 1), got 1.0 for '*'"),
        (per_layer, {"*": math.nan}, ValueError, "a rate, the fraction of zeros, in [0, 1), got nan for '*'"),
        (from_plan, 3, TypeError, "a Report, a Plan or a mapping from names to zeros, got int"),
        (from_plan, {"w": 0.5}, TypeError, "the zeros of w to be an int, got a float; per_layer({...}) takes rates"),
        (from_plan, {"w": torch.ones(2)}, TypeError, "the zeros of w to be an int, got a Tensor; pass the report"),
        (in_proportion, lambda w: 1, TypeError, "a function (name, weight) -> number, got <lambda> "),
        (per_layer, {"*": 95}, ValueError, "a rate, the fraction of zeros, in [0, 1), got 95.0 for '*'; 95 %"),
        (from_plan, {"w": -1}, ValueError, "the zeros of w to be at least 0, got -1"),
    ],
)
def test_an_allocation_with_arguments_refuses_bad_ones(make, argument, error, message):
    with pytest.raises(error, match="expected " + re.escape(message)):
        make(argument)


def test_a_plan_without_the_zeros_of_the_weights_is_refused():
    plan = feather_param.plan(net(), final_rate=0.95, max_rate_per_layer=0.5)
    with pytest.raises(ValueError, match=r"expected a plan with the zeros of each weight, got none for 0\.weight"):
        from_plan(plan)


def test_a_controller_state_of_another_allocation_is_refused():
    def controller(**arguments):
        return feather_param.sparsify(net(), final_rate=0.9, total_steps=4, **arguments)

    state = controller(allocation=allocations.uniform).state_dict()
    assert state["allocation"] == "uniform"
    with pytest.raises(
        ValueError, match="state with allocation=erk, got uniform; give sparsify the settings of the run"
    ):
        controller(allocation=allocations.erk).load_state_dict(state)
    older = controller().state_dict()
    del older["allocation"]  # of the time when all weights were ranked together
    controller().load_state_dict(older)
    with pytest.raises(ValueError, match="allocation=erk, got global_magnitude"):
        controller(allocation=allocations.erk).load_state_dict(older)
    rates = controller(allocation=per_layer({"0": 0.5, "*": 0.9}))
    assert rates.state_dict()["allocation"] == "per_layer({'0': 0.5, '*': 0.9})"
    plan = controller(allocation=from_plan({"0.weight": 100, "3.weight": 1900, "4.weight": 9}))
    assert re.fullmatch(r"from_plan\(3 weights, 2009 zeros, [0-9a-f]{8}\)", plan.state_dict()["allocation"])


def with_groups(**changes):
    """Return an allocation that changes the last group of `erk`."""

    def allocation(weights, zeros, guards):
        *others, last = allocations.erk(weights, zeros, guards)
        return [*others, replace(last, **{name: change(last) for name, change in changes.items()})]

    return allocation


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"threshold": lambda group: 0.5}, TypeError, "thresholds that are 0-dim tensors of torch.float32, got 0.5"),
        ({"threshold": lambda group: group.threshold[None]}, TypeError, "thresholds that are 0-dim tensors"),
        ({"threshold": lambda group: group.threshold.half()}, TypeError, "thresholds that are 0-dim tensors"),
        ({"zeros": lambda group: float(group.zeros)}, TypeError, "a tuple of names and an int of zeros, got "),
        ({"names": lambda group: group.names[0]}, TypeError, "a tuple of names and an int of zeros, got '"),
        ({"zeros": lambda group: group.zeros - 1}, ValueError, "zeros to all weights together, got"),
    ],
)
def test_groups_with_wrong_contents_are_refused(changes, error, message):
    with pytest.raises(error, match="expected the allocation .*" + re.escape(message)):
        feather_param.sparsify(net(), final_rate=0.9, total_steps=4, allocation=with_groups(**changes))


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        (per_layer, "got per_layer, which takes other arguments; call it if it returns an allocation"),
        (lambda name, weight: 1, "got <lambda>, which takes other arguments"),
        ({"*": 0.9}, "got dict; use one of feather_param.allocations, per_layer({...}) for rates"),
        ("erk", "got str; use one of feather_param.allocations, for example allocations.erk"),
    ],
)
def test_something_else_in_the_place_of_an_allocation_is_refused_with_a_remedy(allocation, message):
    with pytest.raises(TypeError, match=r"expected allocation to be a function .*" + re.escape(message)):
        feather_param.sparsify(net(), final_rate=0.9, total_steps=4, allocation=allocation)


def test_an_allocation_that_is_wrong_during_the_schedule_is_refused_at_that_step():
    def allocation(weights, zeros, guards):
        return allocations.uniform(weights, zeros if zeros in (0, 2095) else zeros // 2, guards)

    controller = feather_param.sparsify(net(), final_rate=0.9, total_steps=8, allocation=allocation)
    with pytest.raises(ValueError, match=r"the allocation allocation to give 1211 zeros .* got 605"):
        controller.step()
    assert controller.step_count == 0


def without_guards(weights, zeros, guards):
    return global_magnitude(weights, zeros, {})


def half_with_values(weights, zeros, guards):
    return global_magnitude(weights, zeros if next(iter(weights.values())).is_meta else zeros // 2, guards)


def twice_the_threshold(weights, zeros, guards):
    return [replace(group, threshold=2 * group.threshold) for group in global_magnitude(weights, zeros, guards)]


@pytest.mark.parametrize("pattern", [patterns.blocks(1, 4), patterns.n_m(1, 4)], ids=str)
@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        (without_guards, "at most 9 zeros, its guard, got "),
        (half_with_values, "zeros to all weights together, got "),
        (twice_the_threshold, "-th smallest magnitude of "),
        (in_proportion(lambda name, weight: float(weight.abs().mean())), "to accept weights on the meta device, got"),
    ],
)
def test_the_groups_of_units_are_checked_too(allocation, message, pattern):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.normal_(model[0].weight, std=0.01)
    guards = {"max_rate_per_layer": 0.6} if pattern.size == 4 else {"max_rate_per_layer": 9 / 64}
    rate = 0.5 if pattern.size == 4 else 0.12
    with pytest.raises(ValueError, match=r"expected the allocation .*" + re.escape(message)):
        feather_param.sparsify(model, final_rate=rate, total_steps=2, allocation=allocation, pattern=pattern, **guards)


def test_an_empty_group_changes_nothing_with_a_pattern():
    def with_empty(weights, zeros, guards):
        return [Group((), 0, torch.zeros(())), *allocations.erk(weights, zeros, guards)]

    found = []
    for allocation in (with_empty, allocations.erk):
        arguments = {"final_rate": 0.5, "allocation": allocation, "pattern": patterns.blocks(1, 4)}
        found.append(
            [row.zeros for row in feather_param.plan(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), **arguments).rows]
        )
    assert found[0] == found[1]

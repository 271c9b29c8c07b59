"""`plan` gives the zeros that `sparsify` would make, without changing the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import feather_param
from feather_param import allocations, schedules


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 20), nn.ReLU(), nn.Linear(20, 2, bias=False))


def test_a_plan_equals_the_report_of_sparsify_and_does_not_change_the_model():
    model = nn.Sequential(nn.Embedding(10, 40), *net(), nn.LayerNorm(2))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    ids = [id(parameter) for parameter in model.parameters()]
    plan = feather_param.plan(model, final_rate=0.9, min_params=50, max_rate_per_layer=0.91)
    assert [id(parameter) for parameter in model.parameters()] == ids
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    controller = feather_param.sparsify(
        model, final_rate=0.9, total_steps=1, min_params=50, max_rate_per_layer=0.91, schedule=schedules.constant
    )
    report = controller.report()
    assert [(row.name, row.total, row.zeros) for row in plan.rows] == [(r.name, r.total, r.zeros) for r in report.rows]
    assert plan.skipped == report.skipped
    assert plan.skipped["0.weight"] == "a weight of Embedding: name it in include to prune it"
    assert plan.skipped["5.weight"] == "fewer than 50 parameters"
    text = str(plan)
    assert "3,240 zeros of 3,600 elements can be reached; at most 3,276 zeros (91.0000 %)" in text
    assert all(len(line) == len(text.splitlines()[0]) for line in text.splitlines()[:4])


def test_a_plan_says_that_a_rate_cannot_be_reached():
    plan = feather_param.plan(net(), final_rate=0.95, max_rate_per_layer=0.9)
    assert not plan.reachable
    assert [row.zeros for row in plan.rows] == [None] * 3
    assert "3,458 zeros of 3,640 elements CANNOT be reached; at most 3,276 zeros (90.0000 %)" in str(plan)
    (all_in_all,) = (line.split() for line in str(plan).splitlines() if line.startswith("all"))
    assert all_in_all == ["all", "3,640", "3,276", "-", "-"]  # only the last line has the zeros that cannot be reached


def test_a_plan_does_not_round_up_the_most_zeros():
    with torch.device("meta"):
        model = nn.Linear(1280, 1280)
    assert str(feather_param.plan(model, final_rate=0.9)).endswith("at most 1,638,399 zeros (99.9999 %)")


def test_a_model_on_the_meta_device_can_be_planned():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 10))
    plan = feather_param.plan(model, final_rate=0.9)
    assert (plan.zeros, [row.zeros for row in plan.rows]) == (909_000, [None, None])
    assert feather_param.plan(model[0], final_rate=0.9).rows[0].zeros == 900_000  # it follows from the total


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_plan_shows_the_zeros_that_follow_from_shapes(device):
    with torch.device(device):
        model = net()
    plan = feather_param.plan(model, final_rate=0.9, allocation=allocations.erk, max_rate_per_layer=0.92)
    survivors = [row.total - row.zeros for row in plan.rows]
    assert sum(survivors) == 364
    assert survivors == [192, 135, 37]  # the guard keeps 8 % of 40 x 60; the others are as 80 to 22


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_rate_per_layer": 1.0}, ValueError, r"max_rate_per_layer, a fraction of zeros, in \(0, 1\), got 1.0"),
        ({"max_rate_per_layer": 0.0}, ValueError, r"max_rate_per_layer, a fraction of zeros, in \(0, 1\), got 0.0"),
        ({"max_rate_per_layer": "1"}, TypeError, "max_rate_per_layer to be a number, got '1'"),
        ({"min_nonzero_per_layer": -1}, ValueError, "min_nonzero_per_layer to be at least 0, got -1"),
        ({"min_nonzero_per_layer": 0.5}, TypeError, "min_nonzero_per_layer to be an int, got 0.5"),
        ({"final_rate": 2}, ValueError, "final_rate, the fraction of zeros"),
        ({"include": "nowhere"}, ValueError, "include to match a weight"),
    ],
)
def test_bad_arguments_are_refused_by_plan_and_sparsify(arguments, error, message):
    with pytest.raises(error, match="expected " + message):
        feather_param.plan(net(), **{"final_rate": 0.9, **arguments})
    with pytest.raises(error, match="expected " + message):
        feather_param.sparsify(net(), **{"final_rate": 0.9, "total_steps": 4, **arguments})


def test_plan_refuses_the_models_that_sparsify_refuses():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)))
    with pytest.raises(ValueError, match=r"other parametrizations of 0.weight"):
        feather_param.plan(model, final_rate=0.5)

"""Guards and plans: the total is exact, and no weight gets more zeros than its guard."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import feather_param
from feather_param import schedules
from tests import twins
from tests.training import train


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 20), nn.ReLU(), nn.Linear(20, 2, bias=False))


N = 40 * 60 + 60 * 20 + 20 * 2
GUARDS = [
    {"max_rate_per_layer": 0.97},
    {"min_nonzero_per_layer": 25},
    {"max_rate_per_layer": 0.96, "min_nonzero_per_layer": 35},
]


@pytest.mark.parametrize("guards", GUARDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_layer_collapses_and_the_total_is_exact(guards, dtype):
    model = net().to(dtype)
    with torch.no_grad():
        model[2].weight.mul_(0.01)  # without guards all of it would be pruned
    controller = feather_param.sparsify(model, final_rate=0.95, total_steps=6, end_step=3, **guards)
    x = torch.randn(8, 40, dtype=dtype)
    train(model, lambda model, step: model(x).square().mean(), controller, range(6))
    report = controller.report()
    assert report.zeros == round(0.95 * N)
    for row in report.rows:
        assert row.total - row.zeros >= guards.get("min_nonzero_per_layer", 1)
        assert row.rate <= guards.get("max_rate_per_layer", 1.0)
    evaluated = [model[i].weight.detach() for i in (0, 2, 4)]
    feather_param.desparsify(model)
    assert [int((model[i].weight == 0).sum()) for i in (0, 2, 4)] == [row.zeros for row in report.rows]
    for before, i in zip(evaluated, (0, 2, 4), strict=True):
        assert (before - model[i].weight).abs().max() <= torch.finfo(dtype).smallest_normal


def test_a_guard_that_is_not_reached_changes_nothing():
    plain, guarded = net(), net()
    feather_param.sparsify(plain, final_rate=0.5, total_steps=1, schedule=schedules.constant)
    feather_param.sparsify(guarded, final_rate=0.5, total_steps=1, schedule=schedules.constant, max_rate_per_layer=0.9)
    assert all(torch.equal(plain[i].weight, guarded[i].weight) for i in (0, 2, 4))


def test_a_guard_counts_a_tied_weight_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    feather_param.sparsify(model, final_rate=0.7, total_steps=1, schedule=schedules.constant, max_rate_per_layer=0.75)
    assert torch.equal(model[0].weight, model[1].weight)
    assert int((model[1].weight == 0).sum()) == 48
    assert int((model[2].weight == 0).sum()) == round(0.7 * 128) - 48


@pytest.mark.parametrize(
    ("guards", "largest"),
    [({"max_rate_per_layer": 0.5}, 0.5), ({"min_nonzero_per_layer": 40}, (2360 + 1160) / N), ({}, (N - 1) / N)],
)
def test_the_largest_rate_is_reachable_and_a_larger_one_is_refused(guards, largest):
    assert feather_param.plan(net(), final_rate=0.4, **guards).largest_rate == largest
    assert feather_param.plan(net(), final_rate=largest, **guards).reachable
    model = net()
    feather_param.sparsify(model, final_rate=largest, total_steps=1, schedule=schedules.constant, **guards)
    with pytest.warns(UserWarning, match="nothing survives") if not guards else contextlib.nullcontext():
        feather_param.desparsify(model)
    assert twins.count_zeros(twins.prunable(model)) == round(largest * N)
    beyond = largest + 1.0 / N
    if beyond < 1.0:
        assert not feather_param.plan(net(), final_rate=beyond, **guards).reachable
        with pytest.raises(ValueError, match=r"expected a final_rate of at most 0\.\d+, .*loosen them, or prune more"):
            feather_param.sparsify(net(), final_rate=beyond, total_steps=1, **guards)

"""The methods of the tables, as settings of `sparsify`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.methods import METHODS, mirror_step
from tests.twins import ham_step


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5))


@pytest.mark.parametrize(
    ("name", "start", "end", "freeze"),
    [
        ("feather", 0, 50, None),
        ("one_shot", 50, 50, 50),
        ("late_freeze", 0, 50, 75),
        ("late_end", 0, 75, None),
        ("warm_up", 25, 50, None),
    ],
)
def test_a_method_starts_ends_and_freezes_at_fractions_of_the_steps(name, start, end, freeze):
    method = METHODS[name]
    settings = method.settings(model(), 0.9, 100)
    assert (settings["start_step"], settings["end_step"]) == (start, end)
    assert method.freeze_step(100) == freeze


def test_the_guard_is_a_quarter_of_the_mean_number_of_survivors():
    # 30 of 300 elements survive, 15 in the mean of the two weights
    assert METHODS["guard"].settings(model(), 0.9, 100)["min_nonzero_per_layer"] == 15 // 4
    assert "min_nonzero_per_layer" not in METHODS["feather"].settings(model(), 0.9, 100)


def test_the_mirror_step_is_that_of_the_equation():
    layer = nn.Linear(3, 4)
    layer(torch.randn(8, 3)).square().sum().backward()
    with torch.no_grad():
        layer.weight[0, 0] = 0.0
    weight, bias = (parameter.detach().clone() for parameter in layer.parameters())
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    mirror_step(optimizer)
    assert layer.weight.grad is not None
    expected = ham_step(weight.tolist(), layer.weight.grad.tolist(), 1e-3, 200.0, 1e-3)
    # exp of x in float32 is off by |x| * 2**-24 for the rounding of x, and by a few units in the last place itself
    torch.testing.assert_close(layer.weight.detach(), torch.tensor(expected), rtol=1e-5, atol=0.0)
    assert layer.weight[0, 0] == 0
    assert torch.equal(layer.bias, bias)


def test_the_mirror_step_leaves_weights_without_a_gradient():
    layer = nn.Linear(3, 4)
    before = layer.weight.detach().clone()
    mirror_step(torch.optim.SGD(layer.parameters(), lr=0.1))
    assert torch.equal(layer.weight, before)

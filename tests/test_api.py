"""sparsify and desparsify: the model they leave, and warnings about a bake that comes too early."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import feather_param
from tests.network import WEIGHTS, net, train_step
from tests.training import zeros_in

SETTINGS = {"final_rate": 0.9, "total_steps": 4}


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
def test_sparsify_leaves_a_model_in_eval_mode_there(padding_mode):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=padding_mode)).eval()
    feather_param.sparsify(model, final_rate=0.5, total_steps=1)
    assert not any(module.training for module in model.modules())


def test_arguments_may_be_numbers_of_numpy():
    numpy = pytest.importorskip("numpy")
    controller = feather_param.sparsify(net(), final_rate=numpy.float64(0.5), total_steps=numpy.int64(5))
    assert isinstance(controller.state_dict()["total_steps"], int)


def test_all_layers_stay_plain_if_one_refuses_a_parametrization():
    class Stubborn(nn.Linear):
        def __setattr__(self, name, value):
            if name == "parametrizations":
                raise RuntimeError("no parametrization here")
            super().__setattr__(name, value)

    model = nn.Sequential(nn.Linear(4, 4), Stubborn(4, 4))
    with pytest.raises(RuntimeError, match="no parametrization here"):
        feather_param.sparsify(model, final_rate=0.5, total_steps=2)
    assert (type(model[0]), list(model[0].state_dict())) == (nn.Linear, ["weight", "bias"])
    feather_param.sparsify(model[0], final_rate=0.5, total_steps=2)


@pytest.mark.parametrize("steps", [0, 1], ids=["never", "once"])
@pytest.mark.parametrize("bake", [lambda model, _: feather_param.desparsify(model), lambda _, c: c.desparsify()])
def test_a_bake_before_the_end_of_the_schedule_causes_a_warning(steps, bake):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = feather_param.sparsify(model, **SETTINGS)
    for step in range(4):
        train_step(model, optimizer, step)
        if step < steps:
            controller.step()
    zeros = round(controller.rate * WEIGHTS)
    with pytest.warns(
        UserWarning, match=rf"after the 2,095 zeros .*got it at {zeros:,}: call controller.step"
    ) as caught:
        bake(model, controller)
    assert [warning.filename for warning in caught] == [__file__]
    assert zeros_in(model) == zeros


def test_copies_and_frozen_models_may_be_baked_early():
    model = net()
    controller = feather_param.sparsify(model, **SETTINGS)
    average = torch.optim.swa_utils.AveragedModel(model)
    controller.step()
    average.update_parameters(model)
    best = copy.deepcopy(model)
    feather_param.baked_state_dict(model)
    for copied in (average.module, best):
        feather_param.desparsify(copied)
    controller.freeze()
    controller.desparsify()


def test_a_copy_that_its_own_controller_steps_may_not_be_baked_early():
    model = net()
    model, controller = copy.deepcopy((model, feather_param.sparsify(model, **SETTINGS)))
    controller.step()
    with pytest.warns(UserWarning, match="call controller.step"):
        feather_param.desparsify(model)


def test_desparsify_refuses_a_model_in_which_a_layer_was_replaced():
    model = net()
    controller = feather_param.sparsify(model, **SETTINGS, end_step=0)
    model[3] = nn.Linear(128, 16)
    with pytest.raises(
        ValueError, match=r"got a part of it with 280: .*if a layer was replaced after sparsify, put the"
    ):
        controller.desparsify()

"""A run that is saved and resumed continues as if it had not been interrupted."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import feather_param
from tests.network import batch, net, train_step

OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("follows", [True, False], ids=["optimizer=", "step()"])
@pytest.mark.parametrize("stop", [0, 1, 4, 9])
@pytest.mark.parametrize("final_rate", [0.9, 0.98])
@pytest.mark.filterwarnings("ignore:nothing survives")
def test_a_resumed_run_has_the_same_losses_and_weights(make, follows, stop, final_rate):
    def build(seed):
        model = net(seed)
        optimizer = make(model)
        controller = feather_param.sparsify(
            model, final_rate=final_rate, total_steps=10, optimizer=optimizer if follows else None
        )
        return model, optimizer, controller

    def run(model, optimizer, controller, steps):
        losses = []
        for step in steps:
            losses.append(train_step(model, optimizer, step))
            if not follows:
                controller.step()
        return losses

    original = build(seed=0)
    run(*original, range(stop))
    file = io.BytesIO()
    torch.save([each.state_dict() for each in original], file)
    losses = run(*original, range(stop, 12))
    resumed = build(seed=1)
    file.seek(0)
    for each, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        each.load_state_dict(state)
    assert run(*resumed, range(stop, 12)) == losses
    for key, value in original[0].state_dict().items():
        assert torch.equal(value, resumed[0].state_dict()[key]), key
    assert resumed[2].state_dict() == original[2].state_dict()


def test_a_resumed_run_has_the_theta_of_its_step():
    def build():
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        controller = feather_param.sparsify(
            model, final_rate=0.9, total_steps=8, theta=lambda rate: 1.0 - rate, optimizer=optimizer
        )
        return model, optimizer, controller

    original, resumed = build(), build()
    for step in range(3):
        train_step(*original[:2], step)
    for saved, loaded in zip(original, resumed, strict=True):
        loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    for step in range(3, 8):
        assert train_step(*original[:2], step) == train_step(*resumed[:2], step)


def test_the_state_dict_of_the_model_is_enough_to_evaluate_and_bake_it():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    feather_param.sparsify(model, final_rate=0.9, total_steps=4, optimizer=optimizer)
    for step in range(4):
        train_step(model, optimizer, step)
    loaded = net(seed=1)
    feather_param.sparsify(loaded, final_rate=0.5, total_steps=1)
    loaded.load_state_dict(model.state_dict())
    x, _ = batch(9)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    feather_param.desparsify(loaded)
    feather_param.desparsify(model)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_a_resumed_run_may_have_more_steps():
    short = feather_param.sparsify(net(), final_rate=0.5, total_steps=4, end_step=2)
    short.step()
    longer = feather_param.sparsify(net(), final_rate=0.5, total_steps=8, end_step=2)
    longer.load_state_dict(short.state_dict())
    assert longer.step_count == 1

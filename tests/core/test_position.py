"""The position in the schedule, which a model's state_dict holds: training resumes, and older states go back."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import feather_param
from tests import twins
from tests.core.classifier import SIZE, make_step, require_agreement, trained_classifier
from tests.core.models import image_loss, linear_net, train_on_noise, zeros_in_pass
from tests.core.sparsified import FINAL_ZEROS, sparsified
from tests.network import WEIGHTS
from tests.training import same_state, train, zeros_in


def saved_and_loaded(*parts) -> list[dict]:
    """Return the states of a model, an optimizer and a controller, written to a file and read again."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("guards", [{}, {"max_rate_per_layer": 0.92, "min_nonzero_per_layer": 20}], ids=["", "guards"])
@pytest.mark.parametrize("freeze_at", [None, 3, 6], ids=lambda at: f"freeze_{at}")
@pytest.mark.parametrize("stop", [0, 1, 3, 4, 7])
@pytest.mark.parametrize("order", ["model first", "controller first"])
def test_a_run_resumed_at_any_step_equals_the_uninterrupted_run(guards, freeze_at, stop, order):
    def start(seed):
        model, controller = sparsified(seed, total_steps=8, end_step=5, **guards)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01), controller

    def run(model, optimizer, controller, steps):
        for step in steps:
            if step == freeze_at:
                controller.freeze()
            train(model, image_loss, controller, [step], optimizer)

    uninterrupted = start(0)
    run(*uninterrupted, range(8))
    first = start(0)
    run(*first, range(stop))
    states = saved_and_loaded(*first)
    model, optimizer, controller = second = start(9)
    if order == "model first":
        model.load_state_dict(states[0])
        controller.load_state_dict(states[2])
    else:
        controller.load_state_dict(states[2])
        model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    run(*second, range(stop, 8))
    assert controller.state_dict() == uninterrupted[2].state_dict()
    assert same_state(model.state_dict(), uninterrupted[0].state_dict())
    feather_param.desparsify(model)
    assert zeros_in(model) == round(controller.rate * WEIGHTS)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("stop", [0, 2, 6])
def test_a_run_resumed_without_the_controllers_state_equals_the_uninterrupted_run(frozen, compiled, stop):
    torch.compiler.reset()

    def start(seed):
        model = linear_net(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        controller = feather_param.sparsify(model, final_rate=0.9, total_steps=8, end_step=4, optimizer=optimizer)
        forward = torch.compile(model, backend="eager") if compiled else model
        return model, optimizer, controller, forward

    def run(model, optimizer, controller, forward, steps):
        for step in steps:
            if frozen and step == 5:
                controller.freeze()
            make_step(forward, optimizer)

    uninterrupted, first, second = start(0), start(0), start(7)
    run(*uninterrupted, range(8))
    run(*first, range(stop))
    for source, target in zip(first[:2], second[:2], strict=True):
        target.load_state_dict(copy.deepcopy(source.state_dict()))
    run(*second, range(stop, 8))
    assert second[2].state_dict() == uninterrupted[2].state_dict()
    assert same_state(second[0].state_dict(), uninterrupted[0].state_dict())


def test_a_resumed_run_continues_with_the_theta_of_its_step():
    states = []
    for resumed in (False, True):
        torch.manual_seed(1)
        settings = {"final_rate": 0.8, "total_steps": 10, "end_step": 5, "theta": lambda rate: 1.0 - rate}
        model = linear_net(outputs=16)
        controller = feather_param.sparsify(model, **settings)
        train_on_noise(model, controller, 3)
        if resumed:
            state = copy.deepcopy(model.state_dict())
            model = linear_net(outputs=16)
            controller = feather_param.sparsify(model, **settings)
            model.load_state_dict(state)
        torch.manual_seed(2)
        train_on_noise(model, controller, 1)
        states.append(model.state_dict())
    assert same_state(*states)


def test_loading_an_earlier_state_restores_its_number_of_zeros_and_a_bake_warns():
    model, controller = sparsified()
    controller.step()
    early, zeros = copy.deepcopy(model.state_dict()), controller.report().zeros
    for _ in range(3):
        controller.step()
    assert controller.report().zeros > zeros
    model.load_state_dict(early)
    assert controller.report().zeros == zeros
    with pytest.warns(
        UserWarning, match=rf"after the {FINAL_ZEROS:,} zeros of final_rate .* got it at {zeros:,}: call"
    ):
        feather_param.desparsify(model)
    assert zeros_in(model) == zeros


def test_restoring_the_model_after_a_learning_rate_range_test_restores_the_schedule():
    model, optimizer, controller = trained_classifier(1)
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    for _ in range(5):
        make_step(model, optimizer)
    model.load_state_dict(before[0])
    optimizer.load_state_dict(before[1])
    assert controller.step_count == 1
    require_agreement(model, controller, round(twins.rate(1, 0.9, 0, 4) * SIZE))
    make_step(model, optimizer)
    assert controller.step_count == 2


def test_the_mean_of_two_states_loads_and_has_the_final_number_of_zeros():
    states = [trained_classifier(seed=seed)[0].state_dict() for seed in (0, 1)]
    model, _, controller = trained_classifier()
    mean = {key: ((each.double() + states[1][key].double()) / 2).to(each.dtype) for key, each in states[0].items()}
    model.load_state_dict(mean)
    require_agreement(model, controller, round(0.9 * SIZE))


def test_the_position_is_loaded_only_when_all_weights_of_the_model_were_loaded():
    model = linear_net(outputs=16)
    controller = feather_param.sparsify(model, final_rate=0.8, total_steps=10, end_step=5)
    before = [copy.deepcopy(model[i].state_dict()) for i in (0, 2)]
    train_on_noise(model, controller, 5)
    model[0].load_state_dict(before[0])
    assert controller.step_count == 5
    assert zeros_in_pass(model) == controller.report().zeros == 819
    larger = nn.Sequential(linear_net(outputs=16), nn.Linear(16, 4))
    larger_controller = feather_param.sparsify(larger, final_rate=0.8, total_steps=10, end_step=5)
    larger[0].load_state_dict(model.state_dict())
    assert (larger_controller.step_count, larger_controller.rate, zeros_in_pass(larger)) == (0, 0.0, 0)
    model[0].load_state_dict(before[0])
    model[2].load_state_dict(before[1])
    assert (controller.step_count, zeros_in_pass(model)) == (0, 0)

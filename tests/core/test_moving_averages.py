"""Moving averages of a sparsified model: they follow its schedule, with thresholds of their own weights."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import feather_param
from tests.core.classifier import INPUTS, SIZE, make_step, require_agreement, trained_classifier
from tests.core.models import IMAGES, average_parameters, linear_net, train_on_noise, zeros_in_pass
from tests.network import WEIGHTS, net
from tests.training import zeros_in


def average_of_data(model: nn.Module):
    """Average the Parameters only, through `.data`."""
    average = copy.deepcopy(model)

    def update() -> None:
        for parameter, target in zip(average.parameters(), model.parameters(), strict=True):
            parameter.data.mul_(0.7).add_(target.data, alpha=0.3)

    return average, update


def average_of_state_dict(model: nn.Module):
    """Average every entry of the state_dict, as timm's ModelEmaV2 does."""
    average = copy.deepcopy(model)

    def update() -> None:
        with torch.no_grad():
            for entry, target in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                entry.copy_(0.7 * entry + 0.3 * target)

    return average, update


def averaged_model(model: nn.Module, **arguments):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), **arguments)
    return average.module, lambda: average.update_parameters(model)


def average_that_shares_buffers(model: nn.Module):
    """Average the Parameters, and let the average share the memory of all buffers, as ignite's EMAHandler does."""
    average = copy.deepcopy(model)

    def update() -> None:
        with torch.no_grad():
            for parameter, target in zip(average.parameters(), model.parameters(), strict=True):
                parameter.mul_(0.7).add_(target, alpha=0.3)
            for buffer, target in zip(average.buffers(), model.buffers(), strict=True):
                buffer.data = target.data

    return average, update


AVERAGES = {
    "shared buffers": average_that_shares_buffers,
    "data": average_of_data,
    "state_dict": average_of_state_dict,
    "AveragedModel": averaged_model,
    "AveragedModel, buffers": lambda model: averaged_model(model, use_buffers=True),
}


@pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("first_step", [0, 2, 5])
@pytest.mark.parametrize("model_first", [True, False])
def test_a_moving_average_is_evaluated_and_baked_with_the_final_number_of_zeros(make, first_step, model_first):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=8, end_step=5)
    update = lambda: None  # noqa: E731
    for step in range(8):
        if step == first_step:
            average, update = make(model)
        model(torch.randn(8, 3, 6, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
        update()
    zeros = round(0.9 * WEIGHTS)
    output, output_of_average = model.eval()(IMAGES), average.eval()(IMAGES)
    assert zeros_in(average) == zeros
    for each in (model, average) if model_first else (average, model):
        feather_param.desparsify(each)
        assert zeros_in(each) == zeros
    assert torch.equal(model(IMAGES), output)
    assert torch.equal(average(IMAGES), output_of_average)


def test_averaged_buffers_do_not_change_the_number_of_zeros_even_when_copied_back():
    model, optimizer, controller = trained_classifier(0)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    for _ in range(8):
        make_step(model, optimizer)
        average.update_parameters(model)
    require_agreement(average.module.eval(), None, round(0.9 * SIZE))
    pairs = zip(
        itertools.chain(model.parameters(), model.buffers()),
        itertools.chain(average.module.parameters(), average.module.buffers()),
        strict=True,
    )
    for tensor, averaged in pairs:
        tensor.data.copy_(averaged.data)
    require_agreement(model.eval(), controller, round(0.9 * SIZE))


def test_overwriting_the_buffers_of_a_teacher_does_not_change_its_output():
    model, optimizer, _ = trained_classifier(2)
    teacher = copy.deepcopy(model).eval()
    output = teacher(INPUTS)
    for _ in range(6):
        make_step(model, optimizer)
    for buffer, source in zip(teacher.buffers(), model.buffers(), strict=True):
        buffer.copy_(source)
    assert torch.equal(teacher(INPUTS), output)


def test_an_updated_average_takes_the_zeros_of_its_model_in_the_next_pass():
    model, optimizer, controller = trained_classifier(0, end_step=8)
    average = copy.deepcopy(model)
    for step in range(1, 9):
        make_step(model, optimizer)
        if step % 3 == 0:
            average_parameters(average, model)
            zeros = controller.report().zeros
            average(INPUTS)
        if step >= 3:
            require_agreement(average, None, zeros)


@pytest.mark.parametrize("frozen", [False, True])
def test_loading_the_state_of_an_average_moves_the_schedule_to_the_step_of_its_zeros(frozen):
    model = linear_net(outputs=16)
    controller = feather_param.sparsify(model, final_rate=0.8, total_steps=10, end_step=5)
    average = AveragedModel(model)
    train_on_noise(model, controller, 4, lambda: average.update_parameters(model))
    zeros = controller.report().zeros
    if frozen:
        controller.freeze()
        train_on_noise(model, controller, 3, lambda: average.update_parameters(model))
    model.load_state_dict(average.module.state_dict())
    assert controller.step_count == 4
    assert zeros_in_pass(model) == zeros == controller.report().zeros
    train_on_noise(model, controller, 1)
    assert zeros_in_pass(model) == round(0.8 * 1024)


class WithController(nn.Module):
    """A model that holds its controller, as Lightning modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = linear_net(outputs=16)
        self.controller = None

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("whole", [True, False])
def test_the_average_of_a_model_that_holds_its_controller_follows_the_model(whole):
    model = WithController()
    model.controller = feather_param.sparsify(model if whole else model.net, final_rate=0.8, total_steps=10, end_step=5)
    average = AveragedModel(model)
    train_on_noise(model, model.controller, 8, lambda: average.update_parameters(model))
    assert zeros_in_pass(average.module) == zeros_in_pass(model) == 819


def test_an_evaluation_of_an_average_that_shares_buffers_does_not_change_the_trained_model():
    model = linear_net()
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, end_step=2)
    average, update = average_that_shares_buffers(model)
    for _ in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        controller.step()
        update()
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        zeros_in_pass(average)
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())

"""Copies in odd company: beside their model in a deepcopy, inside it, with a controller of their own, of a part."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import feather_param

X = torch.ones(3, 16)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


def sparsified(model: nn.Module, **settings) -> feather_param.Controller:
    return feather_param.sparsify(model, **{"final_rate": 0.8, "total_steps": 10, "end_step": 5} | settings)


def train(model: nn.Module, controller: feather_param.Controller, steps: int, after=lambda: None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        controller.step()
        after()


def zeros(model: nn.Module) -> int:
    """Count the zeros that a forward pass computes with."""
    model(X)
    found = [m for m in model.modules() if isinstance(m, nn.Linear) and "parametrizations" in m._modules]
    return sum(int((layer.weight == 0).sum()) for layer in found)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_state_of_an_average_holds_the_step_of_its_zeros(frozen):
    model = layers()
    controller = sparsified(model)
    average = AveragedModel(model)
    train(model, controller, 4, lambda: average.update_parameters(model))
    count = controller.report().zeros
    if frozen:
        controller.freeze()
        train(model, controller, 3, lambda: average.update_parameters(model))
    model.load_state_dict(average.module.state_dict())
    assert controller.step_count == 4
    assert zeros(model) == count == controller.report().zeros
    train(model, controller, 1)
    assert zeros(model) == round(0.8 * 1024)


class Holder(nn.Module):
    """A model that holds its controller, as Lightning modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = layers()
        self.controller = None

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("whole", [True, False])
def test_the_average_of_a_model_that_holds_its_controller(whole):
    model = Holder()
    model.controller = sparsified(model if whole else model.net)
    average = AveragedModel(model)
    train(model, model.controller, 8, lambda: average.update_parameters(model))
    assert zeros(average.module) == zeros(model) == 819


def test_copies_that_are_copied_with_their_model_follow_the_new_one():
    for order in ("model first", "copy first"):
        model = layers()
        controller = sparsified(model)
        average = copy.deepcopy(model)
        if order == "model first":
            new, own, follower = copy.deepcopy((model, controller, average))
        else:
            follower, new, own = copy.deepcopy((average, model, controller))
        later = copy.deepcopy(new)  # of a copy that has its own controller
        train(new, own, 7)
        for each in (follower, later):
            with torch.no_grad():
                for mine, its in zip(each.parameters(), new.parameters(), strict=True):
                    mine.lerp_(its, 0.5)
            assert zeros(each) == zeros(new) == 819
        assert zeros(model) == zeros(average) == 0


class Pair(nn.Module):
    """A model with a moving copy of a part of itself, as in BYOL."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.head = layers(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.online(x))


def test_a_model_with_a_copy_of_a_part_of_itself_is_baked():
    model = Pair()
    controller = sparsified(model)
    model.target = copy.deepcopy(model.online)
    train(model, controller, 7)
    with torch.no_grad():
        for mine, its in zip(model.target.parameters(), model.online.parameters(), strict=True):
            mine.lerp_(its, 0.5)
    outputs = model(X), model.target(X)
    count, target = controller.report().zeros, zeros(model.target)
    twin, its = copy.deepcopy((model, controller))
    train(twin, its, 1)
    with torch.no_grad():
        for parameter in twin.target.parameters():
            parameter.mul_(1.5)
    twin.target(X)
    places = twin.online[0].parametrizations.weight[0], twin.target[0].parametrizations.weight[0]
    assert places[0].threshold == places[1].threshold != controller.threshold
    state = feather_param.baked_state_dict(model)
    feather_param.desparsify(model)
    assert list(state) == list(model.state_dict())
    for before, after in zip(outputs, (model(X), model.target(X)), strict=True):
        torch.testing.assert_close(after, before)
    own = [model.online[0], model.online[2], model.head]
    assert sum(int((layer.weight == 0).sum()) for layer in own) == count == round(0.8 * 1088)
    assert sum(int((model.target[at].weight == 0).sum()) for at in (0, 2)) == target


def test_loading_a_part_leaves_the_schedule_alone():
    model = layers()
    controller = sparsified(model)
    old = [copy.deepcopy(model[at].state_dict()) for at in (0, 2)]
    train(model, controller, 5)
    model[0].load_state_dict(old[0])
    assert controller.step_count == 5
    assert zeros(model) == controller.report().zeros == 819
    other = Pair()
    its = sparsified(other)
    other.online.load_state_dict(model.state_dict())
    assert (its.step_count, its.rate, zeros(other)) == (0, 0.0, 0)
    model[0].load_state_dict(old[0])
    model[2].load_state_dict(old[1])  # now all of it has come
    assert (controller.step_count, zeros(model)) == (0, 0)


def test_passes_agree_whatever_the_order_of_the_layers():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body = nn.Linear(32, 4), nn.Linear(16, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).relu())

    model = Backwards()
    sparsified(model, end_step=0)
    model(X)
    with torch.no_grad():
        model.head.parametrizations.weight.original.mul_(20)
    assert torch.equal(model(X), model(X))
    with torch.no_grad():
        model.body.parametrizations.weight.original.mul_(20)
    model.head(torch.ones(1, 32))  # alone
    model.eval()
    assert zeros(model) == round(0.8 * 640)


def test_buffers_of_somebody_else_are_read_and_never_written():
    model = layers()
    controller = sparsified(model)
    train(model, controller, 2)
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    output = model(X)
    train(model, controller, 4)
    now = {name: value.clone() for name, value in model.named_buffers()}
    kept = {name: value.clone() for name, value in buffers.items()}
    assert torch.equal(torch.func.functional_call(model, {**parameters, **buffers}, (X,)), output)
    for mine, before in ((buffers, kept), (dict(model.named_buffers()), now)):
        assert all(torch.equal(mine[name], value) for name, value in before.items())
    assert zeros(model) == 819


@pytest.mark.parametrize("look", [lambda model, _: model.eval(), lambda _, controller: controller.report()])
def test_a_replaced_parameter_is_noticed(look):
    model = layers()
    controller = sparsified(model, end_step=0)
    model[0].parametrizations.weight.original = nn.Parameter(0.2 * torch.randn(32, 16))
    look(model, controller)
    assert zeros(model) == controller.report().zeros == 819


def test_a_parametrization_before_ours_may_have_parameters():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, weight: Tensor) -> Tensor:
            return self.factor * weight

        def right_inverse(self, weight: Tensor) -> Tensor:
            return weight / self.factor

    model = layers()
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", scale := Scale())
    controller = sparsified(model, end_step=0)
    with torch.no_grad():
        scale.factor.mul_(0.8)
    assert zeros(model) == controller.report().zeros == 819


def test_theta_follows_a_load():
    runs = []
    for resumed in (False, True):
        torch.manual_seed(1)
        model = layers()
        controller = sparsified(model, theta=lambda rate: 1.0 - rate)
        train(model, controller, 3)
        if resumed:
            state = copy.deepcopy(model.state_dict())
            model = layers()
            controller = sparsified(model, theta=lambda rate: 1.0 - rate)
            model.load_state_dict(state)
        torch.manual_seed(2)
        train(model, controller, 1)
        runs.append(model.state_dict())
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())

"""Frozen masks: training goes on, the zeros stay where they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import feather_param
from tests import twins
from tests.training import train

N = 2328
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 16), nn.Linear(16, 4))


def trained(**arguments):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    controller = feather_param.sparsify(model, **{"final_rate": 0.9, "total_steps": 6, "end_step": 3, **arguments})
    train(model, loss, controller, range(4), optimizer)
    return model, optimizer, controller


def loss(model: nn.Module, step: int) -> torch.Tensor:
    return model(torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))).square().mean()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [model[i].weight for i in (0, 3, 4)]


def masks(model: nn.Module) -> list[torch.Tensor]:
    return [weight != 0 for weight in weights(model)]


@pytest.mark.filterwarnings("ignore:nothing survives")
@pytest.mark.parametrize("arguments", [{}, {"final_rate": 0.98}, {"p": 1.0}, {"min_nonzero_per_layer": 30}], ids=str)
def test_zeros_stay_and_the_others_train(arguments):
    model, optimizer, controller = trained(**arguments)
    out, before = model.eval()(X), masks(model)
    controller.freeze()
    torch.testing.assert_close(model(X), out, rtol=0, atol=1e-30)  # the smallest numbers stand in for ties
    frozen, values = masks(model), [weight.detach().clone() for weight in weights(model)]
    assert sum(int((a != b).sum()) for a, b in zip(before, frozen, strict=True)) == 0
    zeros, rate = controller.report().zeros, controller.rate
    assert zeros == round(arguments.get("final_rate", 0.9) * N)
    train(model.train(), loss, controller, range(4, 12), optimizer)
    assert all(torch.equal(a, b) for a, b in zip(masks(model), frozen, strict=True))
    assert not any(torch.equal(a, b) and a.any() for a, b in zip(weights(model), values, strict=True))
    assert (controller.rate, controller.step_count, controller.report().zeros) == (rate, 12, zeros)
    out = model.eval()(X)
    feather_param.desparsify(model)
    assert torch.equal(model(X), out)
    assert twins.count_zeros(twins.prunable(model)) == zeros


def test_pruned_weights_get_no_gradient():
    model, _, controller = trained(theta=0.5)
    controller.freeze()
    model.zero_grad()
    loss(model, 0).backward()
    for layer, mask in zip((model[0], model[3], model[4]), masks(model), strict=True):
        assert (layer.parametrizations.weight.original.grad[~mask] == 0).all()


def test_a_kept_weight_that_becomes_zero_is_still_kept():
    model, _, controller = trained()
    controller.freeze()
    mask = masks(model)[1]
    with torch.no_grad():
        model[3].parametrizations.weight.original.zero_()
    feather_param.desparsify(model)
    assert torch.equal(model[3].weight != 0, mask)


def test_freezing_amid_the_schedule_holds_its_rate():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=8, end_step=8)
    train(model, loss, controller, range(2))
    rate = controller.rate
    controller.freeze()
    controller.freeze()  # once is enough
    train(model, loss, controller, range(2, 8))
    assert controller.rate == rate == twins.rate(2, 0.9, 0, 8)
    feather_param.desparsify(model)
    assert twins.count_zeros(twins.prunable(model)) == round(rate * N)


def test_copies_of_a_frozen_model():
    model, optimizer, controller = trained()
    controller.freeze()
    twin = copy.deepcopy(model)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    frozen = masks(model)
    train(model, loss, controller, range(4, 8), optimizer)
    ema.update_parameters(model)
    for copied in (twin, ema.module, model):
        assert all(torch.equal(a, b) for a, b in zip(masks(copied), frozen, strict=True))
        feather_param.desparsify(copied)
        assert all(torch.equal(a != 0, b) for a, b in zip(twins.prunable(copied), frozen, strict=True))


@pytest.mark.parametrize("use_buffers", [True, False])
def test_a_moving_average_made_before_goes_on_by_magnitude(use_buffers):
    model, optimizer, controller = trained()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    controller.freeze()
    train(model, loss, controller, range(4, 8), optimizer)
    ema.update_parameters(model)
    ema.eval()(X)
    feather_param.desparsify(ema.module)
    assert twins.count_zeros(twins.prunable(ema.module)) == round(0.9 * N)


def test_masks_follow_the_dtype_and_only_the_controllers_state_thaws():
    model, _, controller = trained()
    state, controller_state = copy.deepcopy((model.state_dict(), controller.state_dict()))
    controller.freeze()
    frozen = masks(model)
    model.to(torch.bfloat16)
    assert model[0].parametrizations.weight[0].mask.dtype == torch.bool
    assert all(torch.equal(a, b) for a, b in zip(masks(model), frozen, strict=True))
    model.float().load_state_dict({"4.bias": torch.ones(4)}, strict=False)
    model.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(masks(model), frozen, strict=True))
    controller.load_state_dict(controller_state)
    assert model[0].parametrizations.weight[0].mask is None
    controller.freeze()
    assert model[0].parametrizations.weight[0].mask is not None


def test_a_part_of_a_frozen_checkpoint_is_weights_with_zeros():
    frozen, _, controller = trained()
    controller.freeze()
    part = {key: value for key, value in frozen.state_dict().items() if key.startswith("3.")}
    model, optimizer, controller = trained()
    model.load_state_dict(part, strict=False)
    train(model, loss, controller, range(2), optimizer)
    assert twins.count_zeros(weights(model)) == controller.report().zeros == round(0.9 * N)


def test_the_state_has_the_same_entries_and_is_enough():
    model, optimizer, controller = trained()
    keys = list(model.state_dict())
    controller.freeze()
    train(model, loss, controller, range(4, 6), optimizer)
    optimizer.step()  # a state between an optimizer's step and the controller's
    state = copy.deepcopy(model.state_dict())
    assert list(state) == keys
    other, _, _ = trained()
    other.load_state_dict(state)
    assert torch.equal(other.eval()(X), model.eval()(X))
    baked = feather_param.baked_state_dict(other)
    assert all(torch.equal(value, baked[key]) for key, value in feather_param.baked_state_dict(model).items())


def test_an_average_over_states_goes_on_through_a_freeze():
    model, optimizer, controller = trained()
    average = copy.deepcopy(model)
    for step in range(4, 10):
        if step == 6:
            controller.freeze()
        train(model, loss, controller, [step], optimizer)
        with torch.no_grad():
            for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                mine.copy_(0.5 * mine + 0.5 * theirs if mine.is_floating_point() else theirs)
    average.eval()(X)
    seen = twins.count_zeros(weights(average))
    feather_param.desparsify(average)
    assert seen == twins.count_zeros(weights(average)) == round(0.9 * N)


@pytest.mark.parametrize("order", ["model first", "controller first"])
def test_resuming_frozen_finds_the_masks_again(order):
    model, optimizer, controller = trained()
    controller.freeze()
    train(model, loss, controller, range(4, 6), optimizer)
    states = [copy.deepcopy(part.state_dict()) for part in (model, controller, optimizer)]
    train(model, loss, controller, range(6, 9), optimizer)
    torch.manual_seed(1)
    other, other_optimizer, other_controller = trained()
    parts = list(zip((other, other_controller, other_optimizer), states, strict=True))
    for part, state in parts if order == "model first" else [parts[1], parts[0], parts[2]]:
        part.load_state_dict(state)
    train(other, loss, other_controller, range(6, 9), other_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(weights(other), weights(model), strict=True))


def test_freezing_in_inference_mode_leaves_a_model_that_trains():
    model, optimizer, controller = trained()
    with torch.inference_mode():
        controller.freeze()
    train(model, loss, controller, range(4, 6), optimizer)
    model.type(torch.float32)
    assert model[3].parametrizations.weight[0].mask.dtype == torch.bool


def test_what_is_zero_before_the_pruning_begins_is_not_masked():
    model = net()
    with torch.no_grad():
        model[4].weight.zero_()  # as a new head often is
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=8, start_step=4)
    with pytest.warns(UserWarning, match="got it at 0: call controller.step"):
        controller.freeze()
    train(model, loss, controller, range(2))
    assert model[4].weight.all()


def test_freezing_is_possible_where_only_the_controllers_state_was_frozen():
    _, _, controller = trained()
    controller.freeze()
    model, _, other = trained()
    other.load_state_dict(controller.state_dict())
    other.freeze()
    assert all(layer.parametrizations.weight[0].mask is not None for layer in (model[0], model[3], model[4]))


def test_a_dense_checkpoint_takes_over_the_masks():
    model, _, controller = trained()
    controller.freeze()
    frozen = masks(model)
    torch.manual_seed(5)
    model.load_state_dict(nn.Sequential(*(copy.deepcopy(layer) for layer in net())).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(masks(model), frozen, strict=True))


def test_tied_weights_and_other_parametrizations():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), torch_parametrizations.weight_norm(nn.Linear(8, 4)))
    model[1].weight = model[0].weight
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, end_step=0)
    controller.freeze()
    before = [layer.weight != 0 for layer in model]
    train(model, lambda model, step: model(torch.randn(4, 8)).square().mean(), controller)
    assert torch.equal(model[0].weight, model[1].weight)
    assert all(torch.equal(layer.weight != 0, mask) for layer, mask in zip(model, before, strict=True))
    feather_param.desparsify(model)
    assert twins.count_zeros([model[0].weight, model[2].weight]) == 48


def test_nan_is_still_told():
    model, _, controller = trained()
    controller.freeze()
    with torch.no_grad():
        model[3].parametrizations.weight.original[0, 0] = float("nan")
    bake = lambda: feather_param.baked_state_dict(model)  # noqa: E731
    for call in (controller.step, controller.report, controller.masks, controller.desparsify, bake):
        with pytest.raises(ValueError, match=r"expected finite weights, got NaN or infinity in 3\.weight"):
            call()


def test_after_desparsify_it_is_refused():
    model, _, controller = trained()
    feather_param.desparsify(model)
    with pytest.raises(RuntimeError, match=r"expected freeze\(\) before desparsify"):
        controller.freeze()

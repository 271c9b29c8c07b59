"""Frozen masks: training continues, and the zeros stay where they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import feather_param
from tests import twins
from tests.core.classifier import SIZE, make_step, require_agreement, trained_classifier
from tests.core.models import IMAGES, image_loss, sparsify_at_once
from tests.network import WEIGHTS, net
from tests.training import all_equal, dense_weights, train, zeros_in

FINAL_ZEROS = round(0.9 * WEIGHTS)


def trained(**arguments):
    """Return a model at its final rate after four steps, its optimizer with momentum, and its controller."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    controller = feather_param.sparsify(model, **{"final_rate": 0.9, "total_steps": 6, "end_step": 3, **arguments})
    train(model, image_loss, controller, range(4), optimizer)
    return model, optimizer, controller


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [model[i].weight for i in (0, 3, 4)]


def nonzero(model: nn.Module) -> list[torch.Tensor]:
    return [weight != 0 for weight in weights(model)]


def mask_of(layer: nn.Module) -> torch.Tensor | None:
    return layer.parametrizations.weight[0].mask


@pytest.mark.filterwarnings("ignore:nothing survives")
@pytest.mark.parametrize("arguments", [{}, {"final_rate": 0.98}, {"p": 1.0}, {"min_nonzero_per_layer": 30}], ids=str)
def test_frozen_zeros_stay_and_the_kept_elements_train(arguments):
    model, optimizer, controller = trained(**arguments)
    output, before = model.eval()(IMAGES), nonzero(model)
    controller.freeze()
    torch.testing.assert_close(model(IMAGES), output, rtol=0, atol=1e-30)  # kept ties become the smallest numbers
    frozen, values = nonzero(model), [weight.detach().clone() for weight in weights(model)]
    assert all_equal(before, frozen)
    zeros, rate = controller.report().zeros, controller.rate
    assert zeros == round(arguments.get("final_rate", 0.9) * WEIGHTS)
    train(model.train(), image_loss, controller, range(4, 12), optimizer)
    assert all_equal(nonzero(model), frozen)
    assert not any(torch.equal(a, b) and a.any() for a, b in zip(weights(model), values, strict=True))
    assert (controller.rate, controller.step_count, controller.report().zeros) == (rate, 12, zeros)
    output = model.eval()(IMAGES)
    feather_param.desparsify(model)
    assert torch.equal(model(IMAGES), output)
    assert zeros_in(model) == zeros


def test_pruned_elements_of_a_frozen_weight_get_no_gradient():
    model, _, controller = trained(theta=0.5)
    controller.freeze()
    model.zero_grad()
    image_loss(model, 0).backward()
    for dense, mask in zip(dense_weights(model), nonzero(model), strict=True):
        assert (dense.grad[~mask] == 0).all()


def test_a_kept_element_that_becomes_zero_is_baked_as_kept():
    model, _, controller = trained()
    controller.freeze()
    mask = nonzero(model)[1]
    with torch.no_grad():
        model[3].parametrizations.weight.original.zero_()
    feather_param.desparsify(model)
    assert torch.equal(model[3].weight != 0, mask)


def test_elements_that_are_zero_before_the_pruning_begins_are_not_masked():
    model = net()
    with torch.no_grad():
        model[4].weight.zero_()  # as new heads often are
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=8, start_step=4)
    with pytest.warns(UserWarning, match="got it at 0: call controller.step"):
        controller.freeze()
    train(model, image_loss, controller, range(2))
    assert model[4].weight.all()


def test_freezing_before_the_end_of_the_schedule_keeps_the_rate_and_may_be_repeated():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=8, end_step=8)
    train(model, image_loss, controller, range(2))
    rate = controller.rate
    controller.freeze()
    controller.freeze()
    train(model, image_loss, controller, range(2, 8))
    assert controller.rate == rate == twins.rate(2, 0.9, 0, 8)
    feather_param.desparsify(model)
    assert zeros_in(model) == round(rate * WEIGHTS)


def test_tied_weights_and_weights_with_weight_norm_can_be_frozen():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), torch_parametrizations.weight_norm(nn.Linear(8, 4)))
    model[1].weight = model[0].weight
    controller = sparsify_at_once(model)
    controller.freeze()
    before = [layer.weight != 0 for layer in model]
    train(model, lambda model, step: model(torch.randn(4, 8)).square().mean(), controller)
    assert torch.equal(model[0].weight, model[1].weight)
    assert all(torch.equal(layer.weight != 0, mask) for layer, mask in zip(model, before, strict=True))
    feather_param.desparsify(model)
    assert twins.count_zeros([model[0].weight, model[2].weight]) == 48


def test_a_model_that_was_frozen_in_inference_mode_can_be_trained_and_cast():
    model, optimizer, controller = trained()
    with torch.inference_mode():
        controller.freeze()
    train(model, image_loss, controller, range(4, 6), optimizer)
    model.type(torch.float32)
    assert mask_of(model[3]).dtype == torch.bool


def test_nan_in_a_frozen_weight_is_refused():
    model, _, controller = trained()
    controller.freeze()
    with torch.no_grad():
        model[3].parametrizations.weight.original[0, 0] = float("nan")
    bake = lambda: feather_param.baked_state_dict(model)  # noqa: E731
    for call in (controller.step, controller.report, controller.masks, controller.desparsify, bake):
        with pytest.raises(ValueError, match=r"expected finite weights, got NaN or infinity in 3\.weight"):
            call()


def test_freezing_after_desparsify_is_refused():
    model, _, controller = trained()
    feather_param.desparsify(model)
    with pytest.raises(RuntimeError, match=r"expected freeze\(\) before desparsify"):
        controller.freeze()


# -- copies


def test_copies_of_a_frozen_model_keep_its_masks():
    model, optimizer, controller = trained()
    controller.freeze()
    copied = copy.deepcopy(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    frozen = nonzero(model)
    train(model, image_loss, controller, range(4, 8), optimizer)
    average.update_parameters(model)
    for each in (copied, average.module, model):
        assert all_equal(nonzero(each), frozen)
        feather_param.desparsify(each)
        assert all_equal(nonzero(each), frozen)


@pytest.mark.parametrize("use_buffers", [True, False])
def test_a_moving_average_made_before_the_freeze_is_still_pruned_by_magnitude(use_buffers):
    model, optimizer, controller = trained()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    controller.freeze()
    train(model, image_loss, controller, range(4, 8), optimizer)
    average.update_parameters(model)
    average.eval()(IMAGES)
    feather_param.desparsify(average.module)
    assert zeros_in(average.module) == FINAL_ZEROS


def test_a_moving_average_of_the_state_dict_keeps_its_number_of_zeros_through_a_freeze():
    model, optimizer, controller = trained()
    average = copy.deepcopy(model)
    for step in range(4, 10):
        if step == 6:
            controller.freeze()
        train(model, image_loss, controller, [step], optimizer)
        with torch.no_grad():
            for entry, source in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                entry.copy_(0.5 * entry + 0.5 * source if entry.is_floating_point() else source)
    average.eval()(IMAGES)
    zeros = zeros_in(average)
    feather_param.desparsify(average)
    assert zeros == zeros_in(average) == FINAL_ZEROS


# -- states


def test_a_frozen_state_has_the_same_entries_as_before_and_restores_the_model():
    model, optimizer, controller = trained()
    keys = list(model.state_dict())
    controller.freeze()
    train(model, image_loss, controller, range(4, 6), optimizer)
    optimizer.step()  # no step of the controller follows before the state is saved
    state = copy.deepcopy(model.state_dict())
    assert list(state) == keys
    other, _, _ = trained()
    other.load_state_dict(state)
    assert torch.equal(other.eval()(IMAGES), model.eval()(IMAGES))
    baked = feather_param.baked_state_dict(other)
    assert all(torch.equal(value, baked[key]) for key, value in feather_param.baked_state_dict(model).items())


@pytest.mark.parametrize("order", ["model first", "controller first"])
def test_a_frozen_run_is_resumed_with_the_same_masks(order):
    model, optimizer, controller = trained()
    controller.freeze()
    train(model, image_loss, controller, range(4, 6), optimizer)
    states = [copy.deepcopy(part.state_dict()) for part in (model, controller, optimizer)]
    train(model, image_loss, controller, range(6, 9), optimizer)
    torch.manual_seed(1)
    other, other_optimizer, other_controller = trained()
    parts = list(zip((other, other_controller, other_optimizer), states, strict=True))
    for part, state in parts if order == "model first" else [parts[1], parts[0], parts[2]]:
        part.load_state_dict(state)
    train(other, image_loss, other_controller, range(6, 9), other_optimizer)
    assert all_equal(weights(other), weights(model))


def test_one_layer_of_a_frozen_state_loads_as_weights_and_freezes_nothing():
    frozen, _, controller = trained()
    controller.freeze()
    part = {key: value for key, value in frozen.state_dict().items() if key.startswith("3.")}
    model, optimizer, controller = trained()
    model.load_state_dict(part, strict=False)
    train(model, image_loss, controller, range(2), optimizer)
    assert zeros_in(model) == controller.report().zeros == FINAL_ZEROS


def test_a_plain_state_loads_into_a_frozen_model_under_its_masks():
    model, _, controller = trained()
    controller.freeze()
    frozen = nonzero(model)
    model.load_state_dict(net(5).state_dict())
    assert all_equal(nonzero(model), frozen)


def test_a_cast_and_a_partial_load_keep_the_masks():
    model, _, controller = trained()
    controller.freeze()
    frozen = nonzero(model)
    model.to(torch.bfloat16)
    assert mask_of(model[0]).dtype == torch.bool
    assert all_equal(nonzero(model), frozen)
    model.float().load_state_dict({"4.bias": torch.ones(4)}, strict=False)
    assert mask_of(model[0]) is not None


def test_a_state_from_before_the_freeze_removes_the_masks():
    model, _, controller = trained()
    state, controller_state = copy.deepcopy((model.state_dict(), controller.state_dict()))
    controller.freeze()
    frozen = nonzero(model)
    model.load_state_dict(state)
    assert mask_of(model[0]) is None
    assert all_equal(nonzero(model), frozen)  # by the threshold
    controller.freeze()
    controller.load_state_dict(controller_state)
    assert mask_of(model[0]) is None
    controller.freeze()
    assert mask_of(model[0]) is not None


@pytest.mark.parametrize("loaded", ["model", "controller"])
def test_training_continues_unfrozen_after_a_state_from_before_the_freeze_is_loaded(loaded):
    model, optimizer, controller = trained_classifier(2)
    part = {"model": model, "controller": controller}[loaded]
    state = copy.deepcopy(part.state_dict())
    make_step(model, optimizer)
    controller.freeze()
    part.load_state_dict(state)
    assert controller.step_count == 2
    for _ in range(6):
        make_step(model, optimizer)
    require_agreement(model, controller, round(0.9 * SIZE))


def test_freeze_may_be_called_after_the_controller_loaded_a_frozen_state():
    _, _, controller = trained()
    controller.freeze()
    model, _, other = trained()
    other.load_state_dict(controller.state_dict())
    other.freeze()
    assert all(mask_of(model[i]) is not None for i in (0, 3, 4))

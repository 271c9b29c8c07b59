"""Deepcopies: snapshots, teachers, copies of a part, copies of copies, and copies with a controller of their own."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import feather_param
from tests import twins
from tests.core.classifier import INPUTS, make_step, require_agreement, trained_classifier
from tests.core.models import (
    IMAGES,
    average_parameters,
    linear_net,
    scale_weights,
    sparsify_at_once,
    train_on_noise,
    zeros_in_pass,
)
from tests.network import WEIGHTS, net
from tests.training import dense_weights, zero_where_masked, zeros_in

# -- the weights of the copy do not change


def test_a_snapshot_keeps_its_outputs_and_zeros_while_the_model_is_pruned_further():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=8, end_step=8)
    for _ in range(2):
        controller.step()
    snapshot = copy.deepcopy(model).eval()
    output, rate = snapshot(IMAGES), controller.rate
    for _ in range(6):
        controller.step()
    assert torch.equal(snapshot(IMAGES), output)
    feather_param.desparsify(snapshot)
    assert torch.equal(snapshot(IMAGES), output)
    assert zeros_in(snapshot) == round(rate * WEIGHTS)


def test_a_snapshot_keeps_its_zeros_after_a_cast():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=8, end_step=8)
    controller.step()
    zeros = controller.report().zeros
    snapshots = [copy.deepcopy(model).to(dtype) for dtype in (torch.bfloat16, torch.float64, torch.float16)]
    for _ in range(7):
        controller.step()
    for snapshot in snapshots:
        snapshot(torch.randn(2, 3, 6, 6, dtype=snapshot[0].bias.dtype))
        feather_param.desparsify(snapshot)
        assert zeros_in(snapshot) == zeros


def test_a_teacher_copied_before_the_first_step_stays_dense():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=4)
    teacher = copy.deepcopy(model).eval()
    output = teacher(IMAGES)
    for _ in range(4):
        controller.step()
    assert torch.equal(teacher(IMAGES), output)


def test_a_copy_made_in_inference_mode_computes_the_same():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=4, end_step=0)
    with torch.inference_mode():
        copied = copy.deepcopy(model).eval()
    controller.step()
    with torch.no_grad():
        assert torch.equal(copied(IMAGES), model.eval()(IMAGES))


def test_a_copy_does_not_keep_the_original_alive():
    model = net()
    controller = sparsify_at_once(model, 0.75)
    copied = copy.deepcopy(model)
    reference = weakref.ref(model)  # not to a layer: torch keeps layers alive in the class that their copies share
    del model, controller
    gc.collect()
    assert reference() is None
    feather_param.desparsify(copied)


def test_copies_can_be_stacked_and_called_with_vmap():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))
    sparsify_at_once(model)
    copies = [copy.deepcopy(model) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(copies)
    x = torch.randn(4, 5)
    outputs = torch.func.vmap(lambda p, b: torch.func.functional_call(copies[0], (p, b), (x,)))(parameters, buffers)
    assert torch.allclose(outputs, model(x).expand(3, 4, 2))


# -- the weights of the copy change


def test_a_copy_is_baked_from_its_own_weights_and_the_model_does_not_change():
    model = net()
    sparsify_at_once(model, 0.9)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in dense_weights(copied):
            weight.mul_(torch.rand_like(weight) + 0.5)
    output = model.eval()(IMAGES)
    feather_param.desparsify(copied)
    assert zeros_in(copied) == round(0.9 * WEIGHTS)
    assert torch.equal(model(IMAGES), output)
    assert isinstance(model[0], nn.Conv2d)
    assert type(copied[0]) is nn.Conv2d
    feather_param.desparsify(model)
    assert torch.equal(model(IMAGES), output)
    assert type(model[0]) is nn.Conv2d


def test_a_copy_recomputes_its_threshold_when_any_of_its_weights_is_read_after_a_write():
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(50, 50, bias=False) for name in ("a", "b")})
    sparsify_at_once(model)
    copied = copy.deepcopy(model)
    for name, other in (("a", "b"), ("b", "a")):
        copied[name].weight  # noqa: B018 (a forward pass that begins at this weight)
        scale_weights(copied, 3.0)
        kept = copied[other].weight != 0
        assert torch.equal(kept, copied[other].weight != 0)
        assert int(kept.sum()) + int((copied[name].weight != 0).sum()) == 2500


def test_a_write_to_one_layer_of_a_copy_changes_the_zeros_of_all_layers_in_the_next_pass():
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(50, 50, bias=False) for name in ("backbone", "head")})
    sparsify_at_once(model)
    copied = copy.deepcopy(model)
    for layer in copied.values():
        layer.weight  # noqa: B018 (a forward pass)
    for _ in range(2):
        with torch.no_grad():
            copied["head"].parametrizations.weight.original.mul_(3.0)
        first = [layer.weight.detach().clone() for layer in copied.values()]
        assert all(torch.equal(layer.weight, weight) for layer, weight in zip(copied.values(), first, strict=True))
        assert twins.count_zeros(first) == 2500


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("copied_first", [False, True])
def test_a_changed_copy_takes_the_number_of_zeros_that_was_loaded_into_its_model(assign, copied_first):
    source = net()
    sparsify_at_once(source)
    model = net()
    feather_param.sparsify(model, final_rate=0.9, total_steps=4)  # no step yet: the rate is 0
    copied = copy.deepcopy(model) if copied_first else None
    model.load_state_dict(source.state_dict(), assign=assign)
    copied = copied or copy.deepcopy(model)
    scale_weights(copied, 1.01)
    zeros = zeros_in(copied)
    feather_param.desparsify(copied)
    assert zeros == zeros_in(copied) == round(0.5 * WEIGHTS)


def test_a_copy_that_is_trained_without_a_controller_takes_the_zeros_of_the_model_and_warns():
    model, optimizer, controller = trained_classifier(2)
    snapshot, controlled = copy.deepcopy(model), copy.deepcopy((model, controller))
    zeros = controller.report().zeros
    for network in (snapshot, controlled[0]):
        make_step(network, torch.optim.SGD(network.parameters(), lr=0.1))
        network(INPUTS)  # the model still has the same number of zeros: no warning
    for _ in range(4):
        make_step(model, optimizer)
    for network in (snapshot, controlled[0]):
        make_step(network, torch.optim.SGD(network.parameters(), lr=0.1))
    require_agreement(*controlled, zeros)
    with pytest.warns(UserWarning, match=rf"trained, and no controller steps it: it had {zeros} .* takes the 576 of"):
        snapshot(INPUTS)
    require_agreement(snapshot, None, 576)


# -- copies with a controller


def test_a_model_that_is_copied_with_its_controller_has_a_schedule_of_its_own():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=4)
    other_model, other_controller = copy.deepcopy((model, controller))
    other_controller.step()
    assert (controller.step_count, other_controller.step_count) == (0, 1)
    assert twins.count_zeros([other_model[3].weight]) > 0 == twins.count_zeros([model[3].weight])


def test_the_masks_of_a_copy_with_its_controller_are_those_of_a_bake():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=9, end_step=9)
    controller.step()
    other_model, other_controller = copy.deepcopy((model, controller))
    for _ in range(4):
        controller.step()
    weight = other_model[0].parametrizations.weight.original.data
    weight.neg_().view(-1)[weight.abs().argmax()].mul_(2.0)  # as many elements above the threshold as before
    masks, state = other_controller.masks(), feather_param.baked_state_dict(other_model)
    assert zero_where_masked(state, masks)


def test_copies_that_are_copied_together_with_their_model_follow_the_new_model():
    for order in ("model first", "copy first"):
        model = linear_net(outputs=16)
        controller = feather_param.sparsify(model, final_rate=0.8, total_steps=10, end_step=5)
        average = copy.deepcopy(model)
        if order == "model first":
            new_model, new_controller, new_average = copy.deepcopy((model, controller, average))
        else:
            new_average, new_model, new_controller = copy.deepcopy((average, model, controller))
        later_average = copy.deepcopy(new_model)  # a copy of a copy that has its own controller
        train_on_noise(new_model, new_controller, 7)
        for each in (new_average, later_average):
            average_parameters(each, new_model)
            assert zeros_in_pass(each) == zeros_in_pass(new_model) == 819
        assert zeros_in_pass(model) == zeros_in_pass(average) == 0


# -- copies of a part


def test_a_changed_copy_of_a_layer_takes_the_threshold_of_the_model():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=4)
    part = copy.deepcopy(model[3])
    for _ in range(4):
        controller.step()
    with torch.no_grad():
        part.parametrizations.weight.original.mul_(0.999)
    part(torch.randn(1, 128))
    dense = part.parametrizations.weight.original
    assert torch.equal(part.weight == 0, dense.abs() <= controller.threshold)


class OnlineAndTarget(nn.Module):
    """A model with a moving average of a part of itself, as in BYOL. The average is added as `target`."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.head = linear_net(outputs=16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.online(x))


def test_a_model_that_contains_an_average_of_its_own_part_is_copied_and_baked():
    x = torch.ones(3, 16)
    model = OnlineAndTarget()
    controller = feather_param.sparsify(model, final_rate=0.8, total_steps=10, end_step=5)
    model.target = copy.deepcopy(model.online)
    train_on_noise(model, controller, 7)
    average_parameters(model.target, model.online)
    outputs = model(x), model.target(x)
    zeros, target_zeros = controller.report().zeros, zeros_in_pass(model.target)
    other_model, other_controller = copy.deepcopy((model, controller))
    train_on_noise(other_model, other_controller, 1)
    with torch.no_grad():
        for parameter in other_model.target.parameters():
            parameter.mul_(1.5)
    other_model.target(x)
    online, target = (part[0].parametrizations.weight[0] for part in (other_model.online, other_model.target))
    assert online.threshold == target.threshold != controller.threshold
    state = feather_param.baked_state_dict(model)
    feather_param.desparsify(model)
    assert list(state) == list(model.state_dict())
    for before, after in zip(outputs, (model(x), model.target(x)), strict=True):
        torch.testing.assert_close(after, before)
    assert zeros_in(model.online) + zeros_in(model.head) == zeros == round(0.8 * 1088)
    assert zeros_in(model.target) == target_zeros

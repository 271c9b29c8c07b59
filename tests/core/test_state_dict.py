"""States of plain, sparsified and baked models, and which models load them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations

import feather_param
from tests import twins
from tests.core.models import IMAGES, sparsify_at_once
from tests.core.sparsified import FINAL_ZEROS, at_final_rate, sparsified
from tests.network import net
from tests.training import all_equal, dense_weights, same_state, zeros_in


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_state_loads_into_a_sparsified_model(assign):
    pretrained = net(1)
    model, controller = at_final_rate()
    result = model.load_state_dict(pretrained.state_dict(), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all_equal(dense_weights(model), twins.prunable(pretrained))
    model(IMAGES)
    assert float(controller.threshold) == twins.threshold(dense_weights(model), FINAL_ZEROS)
    assert zeros_in(model) == FINAL_ZEROS
    feather_param.desparsify(model)
    assert zeros_in(model) == FINAL_ZEROS


def test_a_plain_state_with_missing_unexpected_or_misshapen_entries_is_refused():
    model, _ = sparsified()
    state = net(1).state_dict()
    del state["3.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*3\.parametrizations\.weight\.original"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*\"9.weight\""):
        model.load_state_dict({**net(1).state_dict(), "9.weight": torch.ones(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**net(1).state_dict(), "3.weight": torch.ones(1, 1)})


def test_a_sparsified_state_loads_into_a_sparsified_model_but_not_into_a_plain_one():
    model, controller = sparsified()
    for _ in range(3):
        controller.step()
    other, _ = sparsified(seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(IMAGES), model.eval()(IMAGES))
    feather_param.desparsify(other)
    feather_param.desparsify(model)
    assert same_state(other.state_dict(), model.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight"):
        net().load_state_dict(sparsified()[0].state_dict())


def test_a_baked_state_loads_into_a_plain_model_and_into_a_sparsified_one():
    model, _ = at_final_rate()
    state = feather_param.baked_state_dict(model)
    plain = net(1)
    plain.load_state_dict(state)
    # A kept tie is baked as the smallest number of its dtype, which is too small to change a sum.
    torch.testing.assert_close(plain.eval()(IMAGES), model.eval()(IMAGES), rtol=0, atol=1e-30)
    other, _ = sparsified(seed=2)
    other.load_state_dict(state)
    assert torch.equal(other.eval()(IMAGES), plain(IMAGES))  # at a rate of zero the operator is the identity


def test_of_a_state_with_dense_and_pruned_weights_a_sparsified_model_loads_the_dense_ones():
    model, controller = at_final_rate()
    dense, pruned = model.state_dict(), feather_param.baked_state_dict(model)
    other, other_controller = sparsified(seed=1)
    other.load_state_dict({**dense, **pruned})
    assert other_controller.step_count == controller.step_count
    assert same_state(other.state_dict(), dense)
    plain = net(1)
    plain.load_state_dict({**dense, **pruned}, strict=False)
    assert same_state(plain.state_dict(), pruned)


def test_a_baked_model_loads_plain_states_only():
    model, _ = at_final_rate()
    state = model.state_dict()
    feather_param.desparsify(model)
    model.load_state_dict(net(1).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)
    assert not model[0]._load_state_dict_pre_hooks


def test_plain_sparsified_and_frozen_models_are_saved_and_loaded_by_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    frozen, controller = at_final_rate()
    controller.freeze()
    for name, source in {"plain": net(1), "sparsified": at_final_rate(1)[0], "frozen": frozen}.items():
        safetensors.save_model(source, tmp_path / name)
        target, _ = at_final_rate(2)
        safetensors.load_model(target, tmp_path / name)
        assert all_equal(dense_weights(target), dense_weights(source) or twins.prunable(source)), name
        feather_param.desparsify(target)
        assert zeros_in(target) == FINAL_ZEROS, name


def test_a_layer_with_weight_norm_loads_the_state_of_one_that_is_not_sparsified():
    torch.manual_seed(0)
    pretrained = torch_parametrizations.weight_norm(nn.Linear(6, 4))
    torch.manual_seed(1)
    layer = torch_parametrizations.weight_norm(nn.Linear(6, 4))
    controller = sparsify_at_once(layer)
    layer.load_state_dict(pretrained.state_dict())
    layer(torch.ones(1, 6))
    assert float(controller.threshold) == twins.threshold([pretrained.weight], 12)


def test_a_model_loads_a_plain_state_after_its_copy_was_baked():
    model, _ = at_final_rate()
    copied = copy.deepcopy(model)
    feather_param.desparsify(copied)
    model.load_state_dict(net(1).state_dict())
    assert torch.equal(dense_weights(model)[0], net(1)[0].weight)


def test_a_model_with_guards_loads_states_and_keeps_its_number_of_zeros():
    arguments = {"max_rate_per_layer": 0.92, "min_nonzero_per_layer": 20}
    source, _ = at_final_rate(1, **arguments)
    other, _ = at_final_rate(2, **arguments)
    other.load_state_dict(source.state_dict())
    assert torch.equal(other.eval()(IMAGES), source.eval()(IMAGES))
    other.load_state_dict(net(3).state_dict())
    other(IMAGES)
    assert zeros_in(other) == FINAL_ZEROS
    other.load_state_dict(at_final_rate(1)[0].state_dict())  # of a model without guards
    assert zeros_in(other) == FINAL_ZEROS


def test_weights_untied_by_a_load_with_assign_are_refused_until_they_are_tied_again():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    model[1].weight = model[0].weight
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, end_step=1)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    message = r"expected 0.weight and 1.weight to share one Parameter.*tie them again"
    for call in (controller.step, controller.desparsify, lambda: feather_param.desparsify(model)):
        with pytest.raises(ValueError, match=message):
            call()
    model[1].parametrizations.weight.original = model[0].parametrizations.weight.original
    controller.step()
    feather_param.desparsify(model)
    assert model[1].weight is model[0].weight


def test_a_plain_state_changes_the_threshold_and_the_compiled_model_at_once():
    pretrained = net(1)
    with torch.no_grad():
        for weight in twins.prunable(pretrained):
            weight.mul_(10)
    model, controller = at_final_rate()
    compiled = torch.compile(model, backend="eager")
    compiled.eval()(IMAGES)
    model.load_state_dict(pretrained.state_dict())
    assert float(controller.threshold) == twins.threshold(dense_weights(model), FINAL_ZEROS)
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES))  # their roots differ by a few ulp
    other, _ = at_final_rate(2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(IMAGES), model(IMAGES))


def test_one_entry_of_a_plain_state_changes_the_threshold():
    model, controller = at_final_rate()
    model.load_state_dict({"3.weight": 10 * net(1)[3].weight.detach()}, strict=False)
    assert float(controller.threshold) == twins.threshold(dense_weights(model), FINAL_ZEROS)


def test_a_state_with_nan_loads_and_the_next_step_refuses_it():
    model, controller = at_final_rate()
    broken = net(1).state_dict()
    broken["3.weight"][0, 0] = float("nan")
    model.load_state_dict(broken)
    with pytest.raises(ValueError, match=r"NaN or infinity in 3\.weight"):
        controller.step()
    before = controller.state_dict()
    with pytest.raises(ValueError, match=r"NaN or infinity in 3\.weight"):
        controller.load_state_dict({**before, "step_count": 3})
    assert controller.state_dict() == before

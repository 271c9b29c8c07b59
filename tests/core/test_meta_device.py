"""Models on the meta device, whose weights have no values until a state is loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import feather_param
from feather_param import schedules
from tests import twins
from tests.core.models import IMAGES, sparsify_at_once, weights_by_name
from tests.core.sparsified import FINAL_ZEROS, at_final_rate
from tests.network import net
from tests.training import dense_weights, zero_where_masked, zeros_in


@pytest.mark.parametrize("kind", ["plain", "sparsified"])
def test_a_model_built_on_the_meta_device_loads_a_state_with_assign(kind):
    source = net(1) if kind == "plain" else at_final_rate(1)[0]
    with torch.device("meta"):
        model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=4, schedule=schedules.constant)
    model.load_state_dict(source.state_dict(), assign=True)
    if kind == "sparsified":
        assert torch.equal(model.eval()(IMAGES), source.eval()(IMAGES))
    controller.step()
    assert float(controller.threshold) == twins.threshold(dense_weights(model), FINAL_ZEROS)
    feather_param.desparsify(model)
    assert zeros_in(model) == FINAL_ZEROS


def test_a_model_built_on_the_meta_device_loads_a_state_after_to_empty():
    source, _ = at_final_rate(1)
    with torch.device("meta"):
        model = net()
    feather_param.sparsify(model, final_rate=0.9, total_steps=4, schedule=schedules.constant)
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(model.eval()(IMAGES), source.eval()(IMAGES))


def test_weights_initialised_after_to_empty_have_the_exact_number_of_zeros():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20))
        controller = sparsify_at_once(model, 0.9, max_rate_per_layer=0.95, min_nonzero_per_layer=3)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    assert zeros_in(model) == controller.report().zeros == round(0.9 * 800)
    controller.step()
    feather_param.desparsify(model)
    assert zeros_in(model) == round(0.9 * 800)


def test_a_frozen_model_recovers_its_masks_after_the_meta_device():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    controller = sparsify_at_once(model, 0.9)
    controller.freeze()
    state, masks = copy.deepcopy(model.state_dict()), controller.masks()
    model.to("meta")
    with pytest.raises(RuntimeError, match=r"expected weights with values, got 0.weight on the meta device; load them"):
        controller.report()
    model.to_empty(device="cpu").load_state_dict(state)
    assert all(torch.equal(mask, masks[name]) for name, mask in controller.masks().items())
    baked = feather_param.baked_state_dict(model)
    model.to("meta").load_state_dict(baked, assign=True)
    assert zero_where_masked(weights_by_name(model), masks)

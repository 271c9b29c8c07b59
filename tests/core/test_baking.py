"""Desparsify: plain modules again, also with parametrizations of other libraries."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

import feather_param
from tests import twins
from tests.core.models import IMAGES, Doubled, sparsify_at_once, weights_by_name
from tests.network import WEIGHTS, net
from tests.training import zero_where_masked, zeros_in


def identity(model: nn.Module) -> tuple:
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()],
        list(model.state_dict()),
        dict(getattr(model.state_dict(), "_metadata", {})),
    )


def test_desparsify_restores_the_classes_the_parameters_and_the_names_of_a_model():
    model = net()
    model[3].weight.requires_grad_(False)
    before = identity(model)
    sparsify_at_once(model)
    feather_param.desparsify(model)
    assert identity(model) == before


def test_reports_forward_passes_and_bakes_agree_after_a_write_that_torch_does_not_count():
    model = net()
    controller = sparsify_at_once(model, 0.75)
    model.eval()(IMAGES)
    model[0].parametrizations.weight.original.data.mul_(torch.rand(8, 3, 3, 3))
    masks, report = controller.masks(), controller.report()
    state = feather_param.baked_state_dict(model)
    assert report.zeros == twins.count_zeros(state[name] for name in masks)
    assert zero_where_masked(state, masks)
    assert zero_where_masked(weights_by_name(model), masks)


def test_a_baked_model_can_be_sparsified_again():
    model = net()
    sparsify_at_once(model, 0.75)
    feather_param.desparsify(model)
    sparsify_at_once(model, 0.9)
    feather_param.desparsify(model)
    assert zeros_in(model) == round(0.9 * WEIGHTS)


@pytest.mark.parametrize("rates", [(0.5, 0.75), (0.75, 0.5)])
def test_two_parts_that_were_sparsified_separately_are_baked_with_their_own_rates(rates):
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Sequential(nn.Linear(6, 6, bias=False)) for name in ("encoder", "decoder")})
    for part, rate in zip(model.values(), rates, strict=True):
        sparsify_at_once(part, rate)
    state = feather_param.baked_state_dict(model)
    evaluated = {name: part[0].weight.detach().clone() for name, part in model.items()}
    feather_param.desparsify(model)
    for (name, part), rate in zip(model.items(), rates, strict=True):
        assert int((part[0].weight == 0).sum()) == round(rate * 36)
        assert torch.equal(state[f"{name}.0.weight"], part[0].weight)
        kept = evaluated[name] != 0
        assert torch.equal(part[0].weight[kept], evaluated[name][kept])


def test_a_part_of_a_sparsified_model_is_refused():
    model = net()
    sparsify_at_once(model)
    with pytest.raises(ValueError, match=r"whole model that was sparsified, 2328 prunable weights, got a part"):
        feather_param.desparsify(model[3])
    assert hasattr(model[3], "parametrizations")


def test_a_plain_model_is_refused():
    for call in (feather_param.desparsify, feather_param.baked_state_dict):
        with pytest.raises(ValueError, match="expected a sparsified model, got a plain Sequential; call sparsify"):
            call(net())


def test_weight_norm_stays_on_a_baked_layer_and_computes_the_same_zeros():
    layer = torch_parametrizations.weight_norm(nn.Linear(6, 4))
    sparsify_at_once(layer, 0.75)
    assert len(layer.parametrizations.weight) == 2
    assert twins.count_zeros([layer.weight]) == 18
    output = layer(torch.ones(1, 6))
    feather_param.desparsify(layer)
    assert twins.count_zeros([layer.weight]) == 18
    assert len(layer.parametrizations.weight) == 1
    assert torch.allclose(layer(torch.ones(1, 6)), output, rtol=1e-5)


def other_parametrizations() -> nn.Module:
    """Return layers with parametrizations of other libraries, that of one Parameter and that of two."""
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Linear(6, 4), nn.Linear(4, 2))
    torch_parametrizations.weight_norm(model[0], dim=2)
    parametrize.register_parametrization(model[2], "weight", Doubled())
    return nn.ModuleDict({"first": model, "again": model[0]})


@pytest.mark.parametrize("frozen", [False, True])
def test_the_baked_state_holds_the_parameters_of_other_parametrizations(frozen):
    model = other_parametrizations()
    controller = sparsify_at_once(model)
    if frozen:
        controller.freeze()
    found, before = feather_param.baked_state_dict(model), copy.deepcopy(model.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    feather_param.desparsify(model)
    expected = model.state_dict()
    assert list(found) == list(expected)
    assert found._metadata == expected._metadata  # type: ignore[attr-defined]
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    plain = other_parametrizations()
    plain.load_state_dict(found)
    assert twins.count_zeros([plain["first"][i].weight for i in (0, 2, 3)]) == 52


def test_a_parametrization_after_ours_is_refused_by_the_baked_state():
    layer = nn.Linear(6, 4)
    sparsify_at_once(layer)
    parametrize.register_parametrization(layer, "weight", Doubled())
    with pytest.raises(ValueError, match=r"expected weight to carry .* none after ours, got another library's; remove"):
        feather_param.baked_state_dict(layer)


def test_a_baked_layer_with_weight_norm_has_none_of_our_hooks():
    layer = torch_parametrizations.weight_norm(nn.Linear(6, 4))
    sparsify_at_once(layer)
    feather_param.desparsify(layer)
    parametrize.remove_parametrizations(layer, "weight")
    layer.load_state_dict(nn.Linear(6, 4).state_dict())
    hooks = [*layer._load_state_dict_pre_hooks.values(), *layer._load_state_dict_post_hooks.values()]
    assert not any("feather_param" in getattr(hook, "hook", hook).__module__ for hook in hooks)


def test_a_row_of_zeros_under_weight_norm_is_baked_as_zeros():
    torch.manual_seed(0)
    layer = torch_parametrizations.weight_norm(nn.Linear(6, 4, bias=False))
    with torch.no_grad():
        layer.parametrizations.weight.original0[1:3] *= 1e-3
    sparsify_at_once(layer)
    feather_param.desparsify(layer)
    assert twins.count_zeros([layer.weight]) == 12
    assert (layer(torch.ones(1, 6))[0, 1:3] == 0).all()


def test_another_parametrized_tensor_of_a_baked_layer_stays_parametrized():
    class DoubledWithoutInverse(nn.Module):
        def forward(self, bias: Tensor) -> Tensor:
            return 2 * bias

    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "bias", DoubledWithoutInverse())
    bias = layer.bias.clone()
    sparsify_at_once(layer, 0.75)
    copied = copy.deepcopy(layer)
    feather_param.desparsify(layer)
    assert torch.equal(layer.bias, bias)
    assert "weight" in dict(layer.named_parameters())
    assert twins.count_zeros([layer.weight]) == 12
    assert torch.equal(copied.weight != 0, layer.weight != 0)
    assert isinstance(layer, nn.Linear)

"""`baked_state_dict`: the state that desparsify would leave, from a model that does not change."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

import feather_param
from tests.core.models import Doubled, sparsify_at_once
from tests.network import net
from tests.training import same_state


@pytest.mark.parametrize("call", ["function", "controller"])
def test_the_baked_state_is_the_one_that_desparsify_leaves(call):
    model = net()
    controller = sparsify_at_once(model, 0.75)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = feather_param.baked_state_dict(model)
    assert same_state(model.state_dict(), before)
    if call == "function":
        feather_param.desparsify(model)
    else:
        controller.desparsify()
    assert same_state(model.state_dict(), state)
    assert model.state_dict()._metadata == state._metadata
    net().load_state_dict(state)


class WithOwnStateDict(nn.Module):
    """A model whose state_dict is made by a function."""

    def __init__(self, make_state: Callable) -> None:
        super().__init__()
        self.net, self.make_state = net(), make_state

    def state_dict(self, *args, **kwargs):
        return self.make_state(self)


def test_a_model_with_its_own_state_dict_is_baked_if_it_uses_torchs_names():
    model = WithOwnStateDict(lambda model: {name: each.detach().clone() for name, each in model.named_parameters()})
    sparsify_at_once(model, 0.75)
    state = feather_param.baked_state_dict(model)
    feather_param.desparsify(model)
    assert same_state(model.state_dict(), state)


def test_a_model_with_its_own_state_dict_under_other_names_is_refused_but_its_copy_can_be_baked():
    for make_state in (lambda model: model.net.state_dict(), lambda model: {"net": model.net.state_dict()}):
        model = WithOwnStateDict(make_state)
        sparsify_at_once(model, 0.75)
        with pytest.raises(ValueError, match=r"got other names for net.0.parametrizations.weight.orig.*deepcopy"):
            feather_param.baked_state_dict(model)
        feather_param.desparsify(copy.deepcopy(model))


def test_wrapped_layers_are_baked_under_the_names_of_the_wrapper():
    for wrap in (checkpoint_wrapper, lambda layer: torch.compile(layer, backend="eager")):
        model = net()
        for i in (0, 4):
            model[i] = wrap(model[i])
        sparsify_at_once(model, 0.75)
        state = feather_param.baked_state_dict(model)
        feather_param.desparsify(model)
        assert same_state(model.state_dict(), state)
        assert model.state_dict()._metadata == state._metadata


class WithAttributeNamedAsWrapper(nn.Module):
    """A model with an attribute that has the name under which torch.compile holds the module inside."""

    def __init__(self) -> None:
        super().__init__()
        self._orig_mod, self.head = nn.ModuleDict({"head": nn.Linear(8, 4)}), nn.Linear(8, 4)


def rename_layer(model, state, prefix, metadata):
    for key in [key for key in state if key.startswith("1.")]:
        state[f"head.{key[2:]}"] = state.pop(key)


def cast_to_half(model, state, prefix, metadata):
    state.update({key: value.half() if value.is_floating_point() else value for key, value in state.items()})


def test_an_attribute_with_a_name_that_wrappers_use_is_baked():
    model = WithAttributeNamedAsWrapper()
    sparsify_at_once(model, 0.75)
    state = feather_param.baked_state_dict(model)
    feather_param.desparsify(model)
    assert same_state(model.state_dict(), state)


def test_a_model_whose_hook_renames_entries_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    model.register_state_dict_post_hook(rename_layer)
    sparsify_at_once(model, 0.75)
    with pytest.raises(ValueError, match=r"got other names for 1.parametrizations.weight.original"):
        feather_param.baked_state_dict(model)


def test_a_model_whose_hook_casts_entries_is_baked_in_their_dtype():
    model = net()
    model.register_state_dict_post_hook(cast_to_half)
    sparsify_at_once(model, 0.75)
    state = feather_param.baked_state_dict(model)
    feather_param.desparsify(model)
    assert {key: value.dtype for key, value in model.state_dict().items()} == {k: v.dtype for k, v in state.items()}
    assert same_state(model.state_dict(), state)


def test_a_dense_layer_with_weight_norm_keeps_its_entries():
    model = net()
    torch_parametrizations.weight_norm(model[4])
    sparsify_at_once(model, 0.75, exclude="4.*")
    state = feather_param.baked_state_dict(model)
    feather_param.desparsify(model)
    assert list(state) == list(model.state_dict())
    assert state._metadata == model.state_dict()._metadata


def test_another_parametrized_tensor_of_a_pruned_layer_keeps_its_entry():
    model = nn.Linear(4, 4)
    parametrize.register_parametrization(model, "bias", Doubled())
    sparsify_at_once(model)
    state = feather_param.baked_state_dict(model)
    feather_param.desparsify(model)
    assert state.keys() == model.state_dict().keys() == {"weight", "parametrizations.bias.original"}
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

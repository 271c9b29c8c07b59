"""Registration of our parametrizations and their removal, also on layers with methods of their own."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

import feather_param
from feather_param.core.attach import remove_parametrizations
from tests import twins
from tests.core.models import Doubled, linear_net, sparsify_at_once
from tests.training import zeros_in


@dataclass
class Description:
    """Everything that sparsify changes on a module."""

    cls: type
    attributes: dict
    parameters: list[tuple[str, int]]  # names and identities
    children: list[tuple[str, Description]]


def describe(module: nn.Module) -> Description:
    own = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_modules", "_buffers")}
    attributes = {key: list(value) if isinstance(value, dict) else str(value) for key, value in own.items()}
    for name in ("_flat_weights", "_flat_weight_refs"):
        attributes.pop(name, None)
    parameters = [(name, id(parameter)) for name, parameter in module._parameters.items()]
    children = [(name, describe(child)) for name, child in module.named_children()]
    return Description(type(module), attributes, parameters, children)


def linear_with_doubled_bias() -> nn.Module:
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "bias", Doubled())
    return layer


MODULES = {
    "Linear": (linear_net, None),
    "LSTM": (lambda: nn.LSTM(4, 4), "weight_*"),
    "attention": (lambda: nn.MultiheadAttention(8, 2), None),
    "weight_norm": (lambda: torch_parametrizations.weight_norm(nn.Linear(8, 8)), None),
    "another parametrized tensor": (linear_with_doubled_bias, None),
}


@pytest.mark.parametrize(("make", "include"), MODULES.values(), ids=MODULES)
def test_desparsify_restores_a_module_and_does_not_change_its_copy(make, include):
    model = make()
    before = describe(model)
    copied = copy.deepcopy(model)
    sparsify_at_once(model, include=include)
    feather_param.desparsify(model)
    assert describe(model) == before
    assert type(copied) is type(model)
    copied.load_state_dict(model.state_dict())


def test_our_parametrization_can_be_removed_from_a_single_layer():
    model = linear_net()
    sparsify_at_once(model)
    copied, dense = copy.deepcopy(model), model[0].parametrizations.weight.original
    pruned = copied[0].weight.detach().clone()
    remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear
    assert model[0].weight is dense
    assert torch.equal(copied[0].weight, pruned)
    assert parametrize.is_parametrized(model[2])


@pytest.mark.parametrize("leave", [True, False])
def test_removal_by_torch_restores_the_layer_and_makes_the_controllers_calls_fail(leave):
    model = linear_net()
    first_layer, classes = describe(model[0]), [type(layer) for layer in model]
    controller = sparsify_at_once(model)
    pruned = model[0].weight.detach().clone()
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=leave)
    after = describe(model[0])
    assert (after.cls, after.attributes) == (first_layer.cls, first_layer.attributes)
    assert torch.equal(model[0].weight, pruned) == leave
    for call in (controller.step, controller.report, controller.refresh, controller.freeze, controller.masks):
        with pytest.raises(
            RuntimeError, match=r"got it without the parametrization of 0\.weight: the layer was replaced"
        ):
            call()
    with pytest.raises(ValueError, match="expected the whole model that was sparsified, 640 prunable"):
        controller.desparsify()
    parametrize.remove_parametrizations(model[2], "weight", leave_parametrized=leave)
    for call in (controller.step, controller.report, controller.desparsify):
        with pytest.raises(RuntimeError, match=r"before desparsify, got it after: the model is plain again"):
            call()
    model.load_state_dict(linear_net().state_dict())
    assert [type(layer) for layer in model] == classes
    sparsify_at_once(model)


@pytest.mark.parametrize("replaced", ["layer", "block"])
def test_a_replaced_layer_makes_steps_and_reports_fail_until_it_is_put_back(replaced):
    model = nn.Sequential(linear_net(), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = sparsify_at_once(model, optimizer=optimizer)
    old = model[0]
    if replaced == "layer":
        model[0] = nn.Sequential(old[0], old[1], nn.Linear(32, 4))
    else:
        model[0] = linear_net()
    missing = r"0\.2\.weight" if replaced == "layer" else r"0\.0\.weight, 0\.2\.weight"
    model(torch.ones(1, 16)).sum().backward()
    for call in (optimizer.step, controller.report):
        with pytest.raises(RuntimeError, match=f"without the parametrization of {missing}: the layer was replaced"):
            call()
    model[0] = old
    optimizer.step()
    assert controller.step_count == 1


def test_layers_may_be_wrapped_after_sparsify():
    model = linear_net()
    controller = sparsify_at_once(model)
    model[0] = nn.Sequential(model[0])
    model[2] = torch.compile(model[2], backend="eager")
    controller.step()
    assert controller.report().zeros == 320
    feather_param.desparsify(model)
    assert zeros_in(model) == 320


class ForwardingWrapper(nn.Module):
    """Like peft's ModulesToSaveWrapper: an attribute that the wrapper lacks is that of a copy inside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(module)})

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["modules_to_save"]["default"], name)

    def forward(self, x: Tensor) -> Tensor:
        return self.modules_to_save["default"](x)


def test_a_layer_in_a_wrapper_that_forwards_attributes_is_pruned_and_restored():
    model = linear_net()
    model[2] = ForwardingWrapper(model[2])
    before = describe(model)
    controller = sparsify_at_once(model, exclude="*original_module*")
    controller.step()
    state = feather_param.baked_state_dict(model)
    feather_param.desparsify(model)
    assert describe(model) == before
    assert list(state) == list(model.state_dict())
    assert twins.count_zeros([model[0].weight, model[2].modules_to_save["default"].weight]) == 320


def test_a_peft_model_with_modules_to_save_can_be_baked_and_then_merged():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"], init_lora_weights=False)
    model = peft.get_peft_model(linear_net(), config)
    sparsify_at_once(model, exclude=["*lora_*", "*original_module*"])
    x = torch.randn(5, 16)
    output = model.eval()(x)
    feather_param.desparsify(model)  # before the merge, which writes to the weight in place
    torch.testing.assert_close(model(x), output)
    torch.testing.assert_close(model.merge_and_unload()(x), output)


class SelfSavingLinear(nn.Module):
    """Like torch_geometric's Linear, it copies and saves its weight in methods of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def __deepcopy__(self, memo):
        twin = SelfSavingLinear(self.inputs, self.outputs)
        twin.weight = copy.deepcopy(self.weight, memo)
        return twin

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def test_a_layer_with_its_own_copy_and_save_methods_is_copied_saved_and_restored():
    torch.manual_seed(0)
    model = nn.Sequential(SelfSavingLinear(8, 16), SelfSavingLinear(16, 4))
    plain = copy.deepcopy(model.state_dict())
    controller = sparsify_at_once(model, include="*.weight")
    x = torch.randn(3, 8)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    state = copy.deepcopy(model.state_dict())
    assert not any(key in state for key in plain)
    model.load_state_dict(plain)
    model.load_state_dict(state)
    output = model(x)
    assert controller.report().zeros == 96
    for network in (model, copied):
        feather_param.desparsify(network)
        assert list(network.state_dict()) == list(plain)
        assert torch.equal(network(x), output)


def test_a_copy_of_torch_geometrics_linear_computes_the_same_after_baking():
    geometric = pytest.importorskip("torch_geometric.nn")
    model = nn.Sequential(geometric.Linear(8, 16), geometric.Linear(16, 4))
    controller = sparsify_at_once(model, include="*.weight")
    output = model(torch.ones(1, 8))
    copied = copy.deepcopy(model)
    feather_param.desparsify(copied)
    assert torch.equal(copied(torch.ones(1, 8)), output)
    assert controller.report().zeros == 96

"""Putting our parametrization on and taking it off: nothing is half done, and nothing is left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import feather_param
from feather_param.core.attach import remove_parametrizations
from tests import twins


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def now(model: nn.Module, rate: float = 0.5, **arguments) -> feather_param.Controller:
    return feather_param.sparsify(model, final_rate=rate, total_steps=2, end_step=0, **arguments)


def picture(module: nn.Module) -> list:
    """Everything about a module that could be left behind."""
    own = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_modules", "_buffers")}
    own = {key: list(value) if isinstance(value, dict) else str(value) for key, value in own.items()}
    for name in ("_flat_weights", "_flat_weight_refs"):
        own.pop(name, None)
    children = [(name, picture(child)) for name, child in module.named_children()]
    return [type(module), own, list(module._parameters), [id(p) for p in module._parameters.values()], children]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


def doubled_bias() -> nn.Module:
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "bias", Doubled())
    return layer


MODULES = {
    "Linear": (net, None),
    "LSTM": (lambda: nn.LSTM(4, 4), "weight_*"),
    "attention": (lambda: nn.MultiheadAttention(8, 2), None),
    "weight_norm": (lambda: torch_parametrizations.weight_norm(nn.Linear(8, 8)), None),
    "another tensor": (doubled_bias, None),
}


@pytest.mark.parametrize(("make", "include"), MODULES.values(), ids=MODULES)
def test_desparsify_leaves_nothing_behind(make, include):
    model = make()
    before = picture(model)
    bystander = copy.deepcopy(model)
    now(model, include=include)
    feather_param.desparsify(model)
    assert picture(model) == before
    assert type(bystander) is type(model)
    bystander.load_state_dict(model.state_dict())


def test_ours_is_taken_off_one_layer_alone():
    model = net()
    now(model)
    copied, dense = copy.deepcopy(model), model[0].parametrizations.weight.original
    pruned = copied[0].weight.detach().clone()
    remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear
    assert model[0].weight is dense
    assert torch.equal(copied[0].weight, pruned)
    assert parametrize.is_parametrized(model[2])


@pytest.mark.parametrize("leave", [True, False])
def test_torchs_own_removal_is_noticed_and_leaves_nothing_behind(leave):
    model = net()
    before = picture(model)
    controller = now(model)
    seen = model[0].weight.detach().clone()
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=leave)
    assert picture(model[0])[:2] == before[4][0][1][:2]
    assert torch.equal(model[0].weight, seen) == leave
    for call in (controller.step, controller.report, controller.refresh, controller.freeze, controller.masks):
        with pytest.raises(
            RuntimeError, match=r"got it without the parametrization of 0\.weight: the layer was replaced"
        ):
            call()
    with pytest.raises(ValueError, match="expected the whole model that was sparsified, 192 prunable"):
        controller.desparsify()
    parametrize.remove_parametrizations(model[2], "weight", leave_parametrized=leave)
    for call in (controller.step, controller.report, controller.desparsify):
        with pytest.raises(RuntimeError, match=r"before desparsify, got it after: the model is plain again"):
            call()
    model.load_state_dict(net().state_dict())
    assert [row[1][0] for row in picture(model)[4]] == [row[1][0] for row in before[4]]
    now(model)


@pytest.mark.parametrize("at", ["layer", "block"])
def test_a_layer_that_is_replaced_is_noticed_at_once(at):
    model = nn.Sequential(net(), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = now(model, optimizer=optimizer)
    old = model[0]
    if at == "layer":
        model[0] = nn.Sequential(old[0], old[1], nn.Linear(16, 4))
    else:
        model[0] = net()
    gone = r"0\.2\.weight" if at == "layer" else r"0\.0\.weight, 0\.2\.weight"
    model(torch.ones(1, 8)).sum().backward()
    for call in (optimizer.step, controller.report):
        with pytest.raises(RuntimeError, match=f"without the parametrization of {gone}: the layer was replaced"):
            call()
    model[0] = old
    optimizer.step()
    assert controller.step_count == 1


def test_a_part_that_is_wrapped_is_still_there():
    model = net()
    controller = now(model)
    model[0] = nn.Sequential(model[0])
    model[2] = torch.compile(model[2], backend="eager")
    controller.step()
    assert controller.report().zeros == 96
    feather_param.desparsify(model)
    assert twins.count_zeros(twins.prunable(model)) == 96


class Forwards(nn.Module):
    """As peft's wrapper for modules that are saved: attributes that it does not have are those of a copy inside."""

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


def test_a_wrapper_that_forwards_attributes():
    model = net()
    model[2] = Forwards(model[2])
    before = picture(model)
    controller = now(model, exclude="*original_module*")
    controller.step()
    state = feather_param.baked_state_dict(model)
    feather_param.desparsify(model)
    assert picture(model) == before
    assert list(state) == list(model.state_dict())
    assert twins.count_zeros([model[0].weight, model[2].modules_to_save["default"].weight]) == 96


def test_pefts_modules_to_save_and_its_merge():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"], init_lora_weights=False)
    model = peft.get_peft_model(net(), config)
    now(model, exclude=["*lora_*", "*original_module*"])
    x = torch.randn(5, 8)
    out = model.eval()(x)
    feather_param.desparsify(model)  # before the adapters are merged: they write to the weight in place
    torch.testing.assert_close(model(x), out)
    torch.testing.assert_close(model.merge_and_unload()(x), out)


class OwnLinear(nn.Module):
    """As torch_geometric's: a Linear that copies and saves its weight by itself."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.n, self.m = n, m
        self.weight = nn.Parameter(torch.randn(m, n))

    def __deepcopy__(self, memo):
        twin = OwnLinear(self.n, self.m)
        twin.weight = copy.deepcopy(self.weight, memo)
        return twin

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def test_a_layer_that_copies_and_saves_its_weight_by_itself():
    torch.manual_seed(0)
    model = nn.Sequential(OwnLinear(8, 16), OwnLinear(16, 4))
    plain = copy.deepcopy(model.state_dict())
    controller = now(model, include="*.weight")
    x = torch.randn(3, 8)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    state = copy.deepcopy(model.state_dict())
    assert not any(key in state for key in plain)
    model.load_state_dict(plain)
    model.load_state_dict(state)
    out = model(x)
    assert controller.report().zeros == 96
    for network in (model, copied):
        feather_param.desparsify(network)
        assert list(network.state_dict()) == list(plain)
        assert torch.equal(network(x), out)


def test_torch_geometrics_linear():
    geometric = pytest.importorskip("torch_geometric.nn")
    model = nn.Sequential(geometric.Linear(8, 16), geometric.Linear(16, 4))
    controller = now(model, include="*.weight")
    out = model(torch.ones(1, 8))
    copied = copy.deepcopy(model)
    feather_param.desparsify(copied)
    assert torch.equal(copied(torch.ones(1, 8)), out)
    assert controller.report().zeros == 96


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


ACTIONS = {
    "nothing": lambda model: None,
    "to": lambda model: model.to("cpu"),
    "double": lambda model: model.double().float(),
    "flatten_parameters": lambda model: model.rnn.flatten_parameters(),
    "to, then a pass": lambda model: model.to("cpu")(torch.randn(3, 1, 4)),
}


@pytest.mark.parametrize("act", ACTIONS.values(), ids=ACTIONS)
def test_an_lstm_can_be_copied_whatever_was_done_to_it(act):
    model = Recurrent()
    controller = now(model, include=["*.weight_[ih]h_l*", "*"])
    act(model)
    assert not any(weight is not None and weight.grad_fn for weight in model.rnn._flat_weights)  # no graph is kept
    x = torch.randn(3, 1, 4)
    out = model(x)
    copies = [copy.deepcopy(model), AveragedModel(model).module, copy.deepcopy(controller)._model]
    assert all(torch.equal(copied(x), out) for copied in copies)
    feather_param.desparsify(model)
    assert torch.equal(model(x), out)
    assert all(weight is not None for weight in model.rnn._flat_weights)


def test_attention_is_pruned_by_default():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    controller = now(model)
    names = [row.name for row in controller.report().rows]
    assert names == ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    separate = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    names = [row.name for row in feather_param.plan(separate, final_rate=0.5).rows]
    assert names == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    assert len(feather_param.plan(nn.MultiheadAttention(8, 2), final_rate=0.5).rows) == 2


def test_what_is_left_out_is_told_of_once_and_not_where_it_was_asked_for():
    def model():
        return nn.ModuleDict({"fc": nn.Linear(8, 8), "big": OwnLinear(32, 32)})

    with pytest.warns(
        UserWarning, match=r"takes 64 of the 1,088 elements .* being big\.weight with 1,024; name them in"
    ):
        now(model())
    now(model(), include="fc")
    now(model(), include="*.weight")
    now(nn.ModuleDict({"fc": nn.Linear(8, 8), "other": nn.Linear(32, 32)}), exclude="other")
    now(nn.ModuleDict({"fc": nn.Linear(8, 8), "big": OwnLinear(7, 9)}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipped_weights_of_which_nothing_is_left(dtype):
    torch.manual_seed(0)
    model = net().to(dtype)
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=8, end_step=6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(100).clamp_(-0.01, 0.01)

    def steps():
        for _ in range(4):
            controller.step()

    with pytest.warns(UserWarning, match=r"nothing survives in 0\.weight, 2\.weight.* equals the threshold") as caught:
        steps()
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="nothing survives"):
        report = controller.report()
    assert (report.survivors, report.dead) == (0, ("0.weight", "2.weight"))
    assert (model[0].weight == 0).all()
    assert f"ties: {report.rows[0].ties} elements of 0.weight equal the threshold and compute as zero" in str(report)


def test_float64_weights_are_numbers():
    layer = nn.Linear(4, 4, bias=False, dtype=torch.float64)
    for scale in (1e-300, 1e300):
        with torch.no_grad():
            layer.weight.copy_(torch.arange(1, 17, dtype=torch.float64).view(4, 4) * scale)
        dense = layer.weight.detach().clone()
        controller = now(layer)
        assert controller.threshold.dtype == torch.float64
        assert controller.report().zeros == 8 == int((layer.weight == 0).sum())
        feather_param.desparsify(layer)
        assert torch.equal(layer.weight != 0, dense > 8 * scale)
    with torch.no_grad():
        layer.weight.fill_(1e-310)
    dense = layer.weight.detach().clone()
    feather_param.sparsify(layer, final_rate=0.5, total_steps=4)
    assert torch.equal(layer.weight, dense)  # a zero threshold is the identity


def test_weights_of_several_precisions_are_cut_at_the_same_place():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(20, 20, bias=False, dtype=d) for d in (torch.float64, torch.float32, torch.half)))
    controller = now(model, 0.7)
    zeros = twins.count_zeros(layer.weight for layer in model)
    assert zeros == controller.report().zeros == 840
    feather_param.desparsify(model)
    assert twins.count_zeros(twins.prunable(model)) == 840

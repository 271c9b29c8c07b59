"""Exact zeros, and a model as it was before."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import feather_param
from archs import densenet, mobilenet_v1, resnet20
from feather_param import schedules
from tests import twins

RATES = [0.5, 0.9, 0.95, 0.98, 0.99, 0.995]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def now(model: nn.Module, rate: float = 0.75, **arguments) -> feather_param.Controller:
    """Sparsify to the final rate at once."""
    return feather_param.sparsify(
        model, final_rate=rate, total_steps=1, schedule=schedules.constant, end_step=0, **arguments
    )


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 16), nn.Linear(16, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", [resnet20, mobilenet_v1, densenet], ids=lambda arch: arch.__name__)
def test_the_zero_count_is_exact_in_each_network(arch, dtype):
    model = arch().to(dtype)
    total = sum(weight.numel() for weight in twins.prunable(model))
    plain = model.state_dict()
    for rate in RATES:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "nothing survives")  # at 99.5 % of random weights, that is expected
            now(model, rate)
            seen = [module.weight.detach().clone() for module in parametrized(model)]
            feather_param.desparsify(model)
        assert twins.count_zeros(twins.prunable(model)) == round(rate * total)
        assert list(model.state_dict()) == list(plain)
        # What was evaluated is what is saved; kept ties stand as the smallest number of the dtype.
        for before, after in zip(seen, twins.prunable(model), strict=True):
            assert (before - after).abs().max() <= torch.finfo(dtype).smallest_normal
        with torch.no_grad():  # other weights for the next rate
            for weight in twins.prunable(model):
                weight.normal_(std=0.05)


def parametrized(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if parametrize.is_parametrized(module)]


@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.25, 6e-8, -1e-7]), min_size=2, max_size=30),
    share=st.floats(0.01, 0.99),
    p=st.sampled_from([1.0, 2.0, 3.0, 5.5, float("inf")]),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=300, deadline=None)
@pytest.mark.filterwarnings("ignore:nothing survives")
def test_the_zero_count_is_exact_with_ties(values, share, p, dtype):
    n = len(values)
    k = round(share * n)
    if k == n:
        return
    layer = nn.Linear(n, 1, bias=False).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([values]))
    dense = layer.weight.detach().clone()
    now(layer, share, p=p)
    evaluated = layer.weight.detach().clone()
    feather_param.desparsify(layer)
    assert (layer.weight == 0).flatten().tolist() == twins.zeros([dense], k)
    kept = layer.weight != 0
    assert (layer.weight.sign() == dense.sign())[kept].all()
    assert (layer.weight - evaluated).abs().max() <= torch.finfo(dtype).smallest_normal


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_ties_are_broken_by_position_whatever_the_memory_format(layout):
    conv = nn.Conv2d(4, 4, 3, bias=False)
    with torch.no_grad():
        conv.weight.fill_(1.0)
    if layout == "channels_last":
        conv.to(memory_format=torch.channels_last)
    now(conv, 0.5)
    with pytest.warns(UserWarning, match="all that is kept of weight equals the threshold"):
        feather_param.desparsify(conv)
    assert (conv.weight.flatten()[:72] == 0).all()
    assert (conv.weight.flatten()[72:] != 0).all()


def identity(model: nn.Module) -> tuple:
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()],
        list(model.state_dict()),
        dict(getattr(model.state_dict(), "_metadata", {})),
    )


def test_the_model_is_itself_again():
    model = net()
    model[3].weight.requires_grad_(False)
    before = identity(model)
    now(model)
    feather_param.desparsify(model)
    assert identity(model) == before


@pytest.mark.parametrize("how", ["function", "controller"])
def test_baked_state_dict_is_what_desparsify_leaves(how):
    model = net()
    controller = now(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = feather_param.baked_state_dict(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    if how == "function":
        feather_param.desparsify(model)
    else:
        controller.desparsify()
    after = model.state_dict()
    assert list(state) == list(after)
    assert state._metadata == after._metadata
    for key, value in after.items():
        assert torch.equal(value, state[key])
    net().load_state_dict(state)


class OwnState(nn.Module):
    """Saves itself in its own way: `how` makes a state_dict from it."""

    def __init__(self, how) -> None:
        super().__init__()
        self.net, self.how = net(), how

    def state_dict(self, *args, **kwargs):
        return self.how(self)


def test_baked_state_dict_of_models_that_save_themselves():
    """Baked, or refused with the model untouched; never dense without a word."""
    model = OwnState(lambda model: {name: each.detach().clone() for name, each in model.named_parameters()})
    now(model)
    state = feather_param.baked_state_dict(model)
    feather_param.desparsify(model)
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for how in (lambda model: model.net.state_dict(), lambda model: {"net": model.net.state_dict()}):
        model = OwnState(how)
        now(model)
        with pytest.raises(ValueError, match=r"got other names for net.0.parametrizations.weight.orig.*deepcopy"):
            feather_param.baked_state_dict(model)
        feather_param.desparsify(copy.deepcopy(model))


def test_baked_state_dict_of_wrapped_layers():
    for wrap in (checkpoint_wrapper, lambda layer: torch.compile(layer, backend="eager")):
        model = net()
        for i in (0, 4):
            model[i] = wrap(model[i])
        now(model)
        state = feather_param.baked_state_dict(model)
        feather_param.desparsify(model)
        assert list(state) == list(model.state_dict())
        assert state._metadata == model.state_dict()._metadata
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class WithHead(nn.Module):
    """A part has the name that torch.compile gives to what it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self._orig_mod, self.head = nn.ModuleDict({"head": nn.Linear(8, 4)}), nn.Linear(8, 4)


def rename(model, state, prefix, metadata):
    for key in [key for key in state if key.startswith("1.")]:
        state[f"head.{key[2:]}"] = state.pop(key)


def halve(model, state, prefix, metadata):
    state.update({key: value.half() if value.is_floating_point() else value for key, value in state.items()})


def test_baked_state_dict_of_models_with_odd_names_and_hooks():
    model = WithHead()
    now(model)
    state = feather_param.baked_state_dict(model)
    feather_param.desparsify(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    model.register_state_dict_post_hook(rename)
    now(model)
    with pytest.raises(ValueError, match=r"got other names for 1.parametrizations.weight.original"):
        feather_param.baked_state_dict(model)
    model = net()
    model.register_state_dict_post_hook(halve)
    now(model)
    state = feather_param.baked_state_dict(model)
    feather_param.desparsify(model)
    assert {key: value.dtype for key, value in model.state_dict().items()} == {k: v.dtype for k, v in state.items()}
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_baked_state_dict_leaves_other_parametrizations_their_entries():
    model = net()
    torch_parametrizations.weight_norm(model[4])
    now(model, exclude="4.*")
    state = feather_param.baked_state_dict(model)
    feather_param.desparsify(model)
    assert list(state) == list(model.state_dict())
    assert state._metadata == model.state_dict()._metadata


def test_a_report_is_what_is_baked_after_writes_that_nobody_sees():
    model = net()
    controller = now(model)
    model.eval()(torch.randn(2, 3, 6, 6))
    model[0].parametrizations.weight.original.data.mul_(torch.rand(8, 3, 3, 3))
    masks, report = controller.masks(), controller.report()
    state = feather_param.baked_state_dict(model)
    assert report.zeros == twins.count_zeros(state[name] for name in masks)
    assert all(torch.equal(state[name] != 0, mask) for name, mask in masks.items())
    assert all(torch.equal(model.get_submodule(name[:-7]).weight != 0, mask) for name, mask in masks.items())


def test_a_deepcopy_is_baked_from_its_own_weights_and_harms_neither():
    model = net()
    now(model, 0.9)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (twin[0], twin[3], twin[4]):
            layer.parametrizations.weight.original.mul_(torch.rand_like(layer.weight) + 0.5)
    x = torch.randn(2, 3, 6, 6)
    out = model.eval()(x)
    feather_param.desparsify(twin)
    assert twins.count_zeros(twins.prunable(twin)) == round(0.9 * 2328)
    assert torch.equal(model(x), out)
    assert isinstance(model[0], nn.Conv2d)
    assert type(twin[0]) is nn.Conv2d
    feather_param.desparsify(model)
    assert torch.equal(model(x), out)
    assert type(model[0]) is nn.Conv2d


def by_hand(model: nn.Module):
    """An average of the parameters alone, through `.data`."""
    ema = copy.deepcopy(model)

    def update() -> None:
        for mine, theirs in zip(ema.parameters(), model.parameters(), strict=True):
            mine.data.mul_(0.7).add_(theirs.data, alpha=0.3)

    return ema, update


def over_state_dict(model: nn.Module):
    """As in timm's ModelEmaV2: every entry of the state_dict is averaged, whatever it means."""
    ema = copy.deepcopy(model)

    def update() -> None:
        with torch.no_grad():
            for mine, theirs in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
                mine.copy_(0.7 * mine + 0.3 * theirs)

    return ema, update


def averaged_model(model: nn.Module, **arguments):
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), **arguments)
    return ema.module, lambda: ema.update_parameters(model)


EMAS = {
    "by hand": by_hand,
    "state_dict": over_state_dict,
    "AveragedModel": averaged_model,
    "AveragedModel, buffers": lambda model: averaged_model(model, use_buffers=True),
}


@pytest.mark.parametrize("make", EMAS.values(), ids=EMAS)
@pytest.mark.parametrize("cut_at", [0, 2, 5])
@pytest.mark.parametrize("live_first", [True, False])
def test_an_ema_copy_is_evaluated_and_baked_from_its_own_weights(make, cut_at, live_first):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=8, end_step=5)
    update = lambda: None  # noqa: E731
    for step in range(8):
        if step == cut_at:
            ema, update = make(model)
        model(torch.randn(8, 3, 6, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
        update()
    k = round(0.9 * 2328)
    x = torch.randn(2, 3, 6, 6)
    live, averaged = model.eval()(x), ema.eval()(x)
    assert twins.count_zeros(ema[i].weight for i in (0, 3, 4)) == k
    for copied in (model, ema) if live_first else (ema, model):
        feather_param.desparsify(copied)
        assert twins.count_zeros(twins.prunable(copied)) == k
    assert torch.equal(model(x), live)
    assert torch.equal(ema(x), averaged)


WRAPPERS = {
    "AveragedModel": lambda model: AveragedModel(model),
    "a parent": lambda model: nn.Sequential(nn.Identity(), model),
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("verb", ["desparsify", "baked_state_dict"])
def test_guards_hold_under_whatever_name_a_model_is_baked(wrap, verb):
    model = net()
    with torch.no_grad():
        model[4].weight.mul_(0.01)
    controller = now(model, 0.5, max_rate_per_layer=0.6)
    zeros = [row.zeros for row in controller.report().rows]
    wrapped = wrap(model)
    state = feather_param.baked_state_dict(wrapped)
    if verb == "desparsify":
        feather_param.desparsify(wrapped)
        state = wrapped.state_dict()
    found = [int((v == 0).sum()) for key, v in state.items() if key.endswith("weight") and v.dim() > 1]
    assert found == zeros


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("how", ["desparsify", "freeze", "baked_state_dict"])
def test_float64_weights_are_exact_too(seed, how):
    torch.manual_seed(seed)
    layer = nn.Linear(40, 30, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(1.0 + 1e-9 * torch.rand_like(layer.weight))  # between the numbers of float32
    controller = now(layer, 0.9)
    evaluated = layer.weight.detach().clone()
    state = feather_param.baked_state_dict(layer)
    if how == "freeze":
        controller.freeze()
    if how != "baked_state_dict":
        feather_param.desparsify(layer)
        state = layer.state_dict()
    assert int((state["weight"] == 0).sum()) == 1080
    assert (state["weight"] - evaluated).abs().max() <= torch.finfo(torch.float64).smallest_normal


def test_other_dtypes_of_a_snapshot_keep_its_zeros():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=8, end_step=8)
    controller.step()
    k = controller.report().zeros
    snapshots = [copy.deepcopy(model).to(dtype) for dtype in (torch.bfloat16, torch.float64, torch.float16)]
    for _ in range(7):
        controller.step()
    for snapshot in snapshots:
        snapshot(torch.randn(2, 3, 6, 6, dtype=snapshot[0].bias.dtype))
        feather_param.desparsify(snapshot)
        assert twins.count_zeros(twins.prunable(snapshot)) == k


def test_a_teacher_from_before_the_pruning_stays_dense():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=4)
    teacher = copy.deepcopy(model).eval()
    x = torch.randn(2, 3, 6, 6)
    out = teacher(x)
    for _ in range(4):
        controller.step()
    assert torch.equal(teacher(x), out)


def test_a_moving_copy_of_a_part_takes_the_threshold_of_the_whole():
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


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_a_moving_copy_of_a_model_that_was_only_loaded(assign, early):
    source = net()
    now(source, 0.5)
    model = net()
    feather_param.sparsify(model, final_rate=0.9, total_steps=4)  # its controller stands at a rate of 0
    copied = copy.deepcopy(model) if early else None
    model.load_state_dict(source.state_dict(), assign=assign)
    copied = copied or copy.deepcopy(model)
    with torch.no_grad():
        for layer in (copied[0], copied[3], copied[4]):
            layer.parametrizations.weight.original.mul_(1.01)
    zeros = sum(int((layer.weight == 0).sum()) for layer in (copied[0], copied[3], copied[4]))
    feather_param.desparsify(copied)
    assert zeros == twins.count_zeros(twins.prunable(copied)) == round(0.5 * 2328)


def test_a_copy_does_not_keep_the_original_alive():
    model = net()
    controller = now(model)
    copied = copy.deepcopy(model)
    gone = weakref.ref(model)  # not its layers: torch keeps those, in the class that they share with their copies
    del model, controller
    gc.collect()
    assert gone() is None
    feather_param.desparsify(copied)


def test_a_copy_made_in_inference_mode_is_a_copy():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=4, end_step=0)
    with torch.inference_mode():
        copied = copy.deepcopy(model).eval()
    x = torch.randn(2, 3, 6, 6)
    controller.step()
    with torch.no_grad():
        assert torch.equal(copied(x), model.eval()(x))


def test_a_snapshot_stays_as_it_was():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=8, end_step=8)
    for _ in range(2):
        controller.step()
    snapshot = copy.deepcopy(model).eval()
    x = torch.randn(2, 3, 6, 6)
    out, rate = snapshot(x), controller.rate
    for _ in range(6):
        controller.step()
    assert torch.equal(snapshot(x), out)
    feather_param.desparsify(snapshot)
    assert torch.equal(snapshot(x), out)
    assert twins.count_zeros(twins.prunable(snapshot)) == round(rate * 2328)


def test_a_deepcopied_pair_goes_on_alone():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=4)
    twin, copied = copy.deepcopy((model, controller))
    copied.step()
    assert (controller.step_count, copied.step_count) == (0, 1)
    assert twins.count_zeros([twin[3].weight]) > 0 == twins.count_zeros([model[3].weight])


def test_other_libraries_parametrizations_stay():
    layer = torch_parametrizations.weight_norm(nn.Linear(6, 4))
    now(layer)
    assert len(layer.parametrizations.weight) == 2
    assert twins.count_zeros([layer.weight]) == 18
    with pytest.raises(ValueError, match=r"weight to carry no parametrization but ours.*deepcopy"):
        feather_param.baked_state_dict(layer)
    out = layer(torch.ones(1, 6))
    feather_param.desparsify(layer)
    assert twins.count_zeros([layer.weight]) == 18
    assert len(layer.parametrizations.weight) == 1
    assert torch.allclose(layer(torch.ones(1, 6)), out, rtol=1e-5)


def test_nothing_is_left_on_a_layer_of_another_library():
    layer = torch_parametrizations.weight_norm(nn.Linear(6, 4))
    now(layer)
    feather_param.desparsify(layer)
    parametrize.remove_parametrizations(layer, "weight")
    layer.load_state_dict(nn.Linear(6, 4).state_dict())
    hooks = [*layer._load_state_dict_pre_hooks.values(), *layer._load_state_dict_post_hooks.values()]
    assert not any("feather_param" in getattr(hook, "hook", hook).__module__ for hook in hooks)


def test_a_row_that_dies_under_weight_norm():
    layer = torch_parametrizations.weight_norm(nn.Linear(6, 4, bias=False))
    with torch.no_grad():
        layer.parametrizations.weight.original0[1:3] *= 1e-3
    now(layer, 0.5)
    feather_param.desparsify(layer)
    assert twins.count_zeros([layer.weight]) == 12
    assert (layer(torch.ones(1, 6))[0, 1:3] == 0).all()


def test_another_parametrized_tensor_of_the_layer_stays_parametrized():
    class Double(nn.Module):
        def forward(self, bias: Tensor) -> Tensor:
            return 2 * bias

    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "bias", Double())
    bias = layer.bias.clone()
    now(layer)
    twin = copy.deepcopy(layer)
    feather_param.desparsify(layer)
    assert torch.equal(layer.bias, bias)
    assert "weight" in dict(layer.named_parameters())
    assert twins.count_zeros([layer.weight]) == 12
    assert torch.equal(twin.weight != 0, layer.weight != 0)
    assert isinstance(layer, nn.Linear)


def test_a_part_of_the_model_is_refused():
    model = net()
    now(model)
    with pytest.raises(ValueError, match=r"whole model that was sparsified, 2328 prunable weights, got a part"):
        feather_param.desparsify(model[3])
    assert hasattr(model[3], "parametrizations")


def test_a_plain_model_is_refused():
    for verb in (feather_param.desparsify, feather_param.baked_state_dict):
        with pytest.raises(ValueError, match="expected a sparsified model, got a plain Sequential; call sparsify"):
            verb(net())


def test_more_zeros_than_asked_stay():
    layer = nn.Linear(10, 1, bias=False)
    with torch.no_grad():
        layer.weight[0, :6] = 0
    now(layer, 0.5)
    feather_param.desparsify(layer)
    assert twins.count_zeros([layer.weight]) == 6


def test_baked_weights_train_on_after_a_new_start():
    model = net()
    now(model)
    feather_param.desparsify(model)
    now(model, 0.9)
    feather_param.desparsify(model)
    assert twins.count_zeros(twins.prunable(model)) == round(0.9 * 2328)


@pytest.mark.parametrize("rates", [(0.5, 0.75), (0.75, 0.5)])
def test_two_parts_sparsified_apart_are_baked_apart(rates):
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Sequential(nn.Linear(6, 6, bias=False)) for name in ("encoder", "decoder")})
    for part, rate in zip(model.values(), rates, strict=True):
        feather_param.sparsify(part, final_rate=rate, total_steps=1, end_step=0)
    state = feather_param.baked_state_dict(model)
    seen = {name: part[0].weight.detach().clone() for name, part in model.items()}
    feather_param.desparsify(model)
    for (name, part), rate in zip(model.items(), rates, strict=True):
        assert int((part[0].weight == 0).sum()) == round(rate * 36)
        assert torch.equal(state[f"{name}.0.weight"], part[0].weight)
        kept = seen[name] != 0
        assert torch.equal(part[0].weight[kept], seen[name][kept])


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def test_other_parametrized_tensors_stay_in_the_baked_state():
    model = nn.Linear(4, 4)
    parametrize.register_parametrization(model, "bias", Doubled())
    now(model, 0.5)
    state = feather_param.baked_state_dict(model)
    feather_param.desparsify(model)
    assert state.keys() == model.state_dict().keys() == {"weight", "parametrizations.bias.original"}
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_copy_looks_at_each_weight_that_is_read():
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(50, 50, bias=False) for name in ("a", "b")})
    now(model, 0.5)
    copied = copy.deepcopy(model)
    for name, other in (("a", "b"), ("b", "a")):
        copied[name].weight  # noqa: B018 (a pass that begins at this one)
        with torch.no_grad():
            for layer in copied.values():
                layer.parametrizations.weight.original.mul_(3.0)
        kept = copied[other].weight != 0
        assert torch.equal(kept, copied[other].weight != 0)
        assert int(kept.sum()) + int((copied[name].weight != 0).sum()) == 2500


def test_an_ensemble_of_copies_under_vmap():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))
    now(model, 0.5)
    copies = [copy.deepcopy(model) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(copies)
    x = torch.randn(4, 5)
    outs = torch.func.vmap(lambda p, b: torch.func.functional_call(copies[0], (p, b), (x,)))(parameters, buffers)
    assert torch.allclose(outs, model(x).expand(3, 4, 2))


def test_a_frozen_backbone_of_a_copy_is_cut_by_the_new_threshold_at_once():
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(50, 50, bias=False) for name in ("backbone", "head")})
    now(model, 0.5)
    copied = copy.deepcopy(model)
    for layer in copied.values():
        layer.weight  # noqa: B018 (it is evaluated)
    for _ in range(2):
        with torch.no_grad():
            copied["head"].parametrizations.weight.original.mul_(3.0)
        first = [layer.weight.detach().clone() for layer in copied.values()]
        assert all(torch.equal(layer.weight, seen) for layer, seen in zip(copied.values(), first, strict=True))
        assert twins.count_zeros(first) == 2500

"""Checkpoints: dense, sparsified and baked ones, each into the model that can take it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations

import feather_param
from feather_param import schedules
from tests import twins
from tests.training import train


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 16), nn.Linear(16, 4))


N = 2328


def sparse(seed: int = 0, **arguments) -> tuple[nn.Sequential, feather_param.Controller]:
    model = net(seed)
    return model, feather_param.sparsify(model, **{"final_rate": 0.9, "total_steps": 4, **arguments})


def at_once(seed: int = 0, **arguments) -> tuple[nn.Sequential, feather_param.Controller]:
    return sparse(seed, schedule=schedules.constant, **arguments)


def dense(model: nn.Module) -> list[torch.Tensor]:
    return [model[i].parametrizations.weight.original for i in (0, 3, 4)]


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_checkpoint_loads_into_a_sparsified_model(assign):
    pretrained = net(1)
    model, controller = at_once()
    result = model.load_state_dict(pretrained.state_dict(), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for mine, theirs in zip(dense(model), twins.prunable(pretrained), strict=True):
        assert torch.equal(mine, theirs)
    model(X)  # the first pass brings the threshold up to the new weights
    assert float(controller.threshold) == twins.threshold(dense(model), round(0.9 * N))
    assert twins.count_zeros(model[i].weight for i in (0, 3, 4)) == round(0.9 * N)
    feather_param.desparsify(model)
    assert twins.count_zeros(twins.prunable(model)) == round(0.9 * N)


def test_a_dense_checkpoint_is_loaded_strictly():
    model, _ = sparse()
    state = net(1).state_dict()
    del state["3.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*3\.parametrizations\.weight\.original"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*\"9.weight\""):
        model.load_state_dict({**net(1).state_dict(), "9.weight": torch.ones(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**net(1).state_dict(), "3.weight": torch.ones(1, 1)})


def test_a_sparsified_checkpoint_loads_into_a_sparsified_model_and_only_there():
    model, controller = sparse()
    for _ in range(3):
        controller.step()
    other, _ = sparse(seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(X), model.eval()(X))  # the model's state alone is enough to evaluate
    feather_param.desparsify(other)
    feather_param.desparsify(model)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight"):
        net().load_state_dict(sparse()[0].state_dict())


def test_a_baked_checkpoint_loads_into_the_plain_model_and_into_a_sparsified_one():
    model, _ = at_once()
    state = feather_param.baked_state_dict(model)
    plain = net(1)
    plain.load_state_dict(state)
    # What is kept of ties is the smallest number of the dtype: nothing in the sum.
    torch.testing.assert_close(plain.eval()(X), model.eval()(X), rtol=0, atol=1e-30)
    again, _ = sparse(seed=2)
    again.load_state_dict(state)
    assert torch.equal(again.eval()(X), plain(X))  # at rate 0 the operator is the identity


def test_through_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, controller = at_once()
    controller.freeze()
    for name, source in {"dense": net(1), "sparsified": at_once(1)[0], "frozen": model}.items():
        safetensors.save_model(source, tmp_path / name)
        target, _ = at_once(2)
        safetensors.load_model(target, tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(dense(target), _originals(source), strict=True)), name
        feather_param.desparsify(target)
        assert twins.count_zeros(twins.prunable(target)) == round(0.9 * N), name


def _originals(model: nn.Module) -> list[torch.Tensor]:
    return dense(model) if hasattr(model[0], "parametrizations") else twins.prunable(model)


@pytest.mark.parametrize("kind", ["dense", "sparsified"])
def test_built_on_the_meta_device_then_loaded(kind):
    source = net(1) if kind == "dense" else at_once(1)[0]
    with torch.device("meta"):
        model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=4, schedule=schedules.constant)
    if kind == "dense":
        model.load_state_dict(source.state_dict(), assign=True)
    else:
        model.load_state_dict(source.state_dict(), assign=True)
        assert torch.equal(model.eval()(X), source.eval()(X))
    controller.step()
    assert float(controller.threshold) == twins.threshold(dense(model), round(0.9 * N))
    feather_param.desparsify(model)
    assert twins.count_zeros(twins.prunable(model)) == round(0.9 * N)


def test_to_empty_then_load():
    source, _ = at_once(1)
    with torch.device("meta"):
        model = net()
    feather_param.sparsify(model, final_rate=0.9, total_steps=4, schedule=schedules.constant)
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(model.eval()(X), source.eval()(X))


def test_another_librarys_layer_takes_its_own_checkpoint():
    torch.manual_seed(0)
    pretrained = torch_parametrizations.weight_norm(nn.Linear(6, 4))
    torch.manual_seed(1)
    layer = torch_parametrizations.weight_norm(nn.Linear(6, 4))
    controller = feather_param.sparsify(layer, final_rate=0.5, total_steps=4, schedule=schedules.constant)
    layer.load_state_dict(pretrained.state_dict())
    layer(torch.ones(1, 6))
    assert float(controller.threshold) == twins.threshold([pretrained.weight], 12)


def test_a_baked_model_takes_plain_checkpoints_only():
    model, _ = at_once()
    state = model.state_dict()
    feather_param.desparsify(model)
    model.load_state_dict(net(1).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)
    assert not model[0]._load_state_dict_pre_hooks


def test_a_deepcopy_takes_dense_checkpoints_and_forgets_alone():
    model, _ = at_once()
    twin = copy.deepcopy(model)
    feather_param.desparsify(twin)
    model.load_state_dict(net(1).state_dict())
    assert torch.equal(dense(model)[0], net(1)[0].weight)


def test_loading_into_a_model_with_guards():
    arguments = {"max_rate_per_layer": 0.92, "min_nonzero_per_layer": 20}
    source, _ = at_once(1, **arguments)
    other, _ = at_once(2, **arguments)
    other.load_state_dict(source.state_dict())
    assert torch.equal(other.eval()(X), source.eval()(X))
    other.load_state_dict(net(3).state_dict())
    other(X)
    assert twins.count_zeros(other[i].weight for i in (0, 3, 4)) == round(0.9 * N)
    other.load_state_dict(at_once(1)[0].state_dict())  # of a model without guards: thresholds are not saved
    assert twins.count_zeros(other[i].weight for i in (0, 3, 4)) == round(0.9 * N)


def test_assign_that_unties_weights_is_told():
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


def test_after_a_dense_checkpoint_everything_is_up_to_date_at_once():
    pretrained = net(1)
    with torch.no_grad():
        for weight in twins.prunable(pretrained):
            weight.mul_(10)
    model, controller = at_once()
    compiled = torch.compile(model, backend="eager")
    compiled.eval()(X)
    model.load_state_dict(pretrained.state_dict())
    assert float(controller.threshold) == twins.threshold(dense(model), round(0.9 * N))
    torch.testing.assert_close(compiled(X), model(X))  # their roots differ by some ulp
    again, _ = at_once(2)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(X), model(X))


def test_a_part_of_a_dense_checkpoint():
    model, controller = at_once()
    model.load_state_dict({"3.weight": 10 * net(1)[3].weight.detach()}, strict=False)
    assert float(controller.threshold) == twins.threshold(dense(model), round(0.9 * N))


def test_a_checkpoint_with_nan_loads_and_is_told_by_the_next_step():
    model, controller = at_once()
    broken = net(1).state_dict()
    broken["3.weight"][0, 0] = float("nan")
    model.load_state_dict(broken)
    with pytest.raises(ValueError, match=r"NaN or infinity in 3\.weight"):
        controller.step()
    before = controller.state_dict()
    with pytest.raises(ValueError, match=r"NaN or infinity in 3\.weight"):
        controller.load_state_dict({**before, "step_count": 3})
    assert controller.state_dict() == before


def everything(model, optimizer, controller) -> io.BytesIO:
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), controller.state_dict()], file)
    file.seek(0)
    return file


@pytest.mark.parametrize("guards", [{}, {"max_rate_per_layer": 0.92, "min_nonzero_per_layer": 20}], ids=["", "guards"])
@pytest.mark.parametrize("freeze_at", [None, 3, 6], ids=lambda at: f"freeze_{at}")
@pytest.mark.parametrize("stop", [0, 1, 3, 4, 7])
@pytest.mark.parametrize("order", ["model first", "controller first"])
def test_resume_at_any_step_equals_the_uninterrupted_run(guards, freeze_at, stop, order):
    def start(seed):
        model, controller = sparse(seed, total_steps=8, end_step=5, **guards)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01), controller

    def loss(model, step):
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        return model(x).square().mean()

    def run(model, optimizer, controller, steps):
        for step in steps:
            if step == freeze_at:
                controller.freeze()
            train(model, loss, controller, [step], optimizer)

    whole = start(0)
    run(*whole, range(8))
    first = start(0)
    run(*first, range(stop))
    states = torch.load(everything(*first))
    second = start(9)
    if order == "model first":
        second[0].load_state_dict(states[0])
        second[2].load_state_dict(states[2])
    else:
        second[2].load_state_dict(states[2])
        second[0].load_state_dict(states[0])
    second[1].load_state_dict(states[1])
    run(*second, range(stop, 8))
    assert second[2].state_dict() == whole[2].state_dict()
    for mine, theirs in zip(second[0].state_dict().items(), whole[0].state_dict().items(), strict=True):
        assert mine[0] == theirs[0]
        assert torch.equal(mine[1], theirs[1]), mine[0]
    feather_param.desparsify(second[0])
    assert twins.count_zeros(twins.prunable(second[0])) == round(second[2].rate * N)


def test_the_report_is_of_what_was_loaded():
    model, controller = sparse()
    best = None
    for step in range(4):
        controller.step()
        if step == 0:
            best, zeros = copy.deepcopy(model.state_dict()), controller.report().zeros
    assert controller.report().zeros > zeros
    model.load_state_dict(best)
    assert controller.report().zeros == zeros
    with pytest.warns(UserWarning, match=rf"after the {round(0.9 * N):,} zeros of final_rate .* got it at {zeros:,}"):
        feather_param.desparsify(model)
    assert sum(int((weight == 0).sum()) for weight in twins.prunable(model)) == zeros


def test_to_empty_then_an_initialisation_of_ones_own():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20))
        guards = {"max_rate_per_layer": 0.95, "min_nonzero_per_layer": 3}
        controller = feather_param.sparsify(model, final_rate=0.9, total_steps=2, end_step=0, **guards)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    zeros = sum(int((model[i].weight == 0).sum()) for i in (0, 2))
    assert zeros == controller.report().zeros == round(0.9 * 800)
    controller.step()
    feather_param.desparsify(model)
    assert sum(int((model[i].weight == 0).sum()) for i in (0, 2)) == zeros


def test_a_frozen_model_goes_over_the_meta_device():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=2, end_step=0)
    controller.freeze()
    state, masks = copy.deepcopy(model.state_dict()), controller.masks()
    model.to("meta")
    with pytest.raises(ValueError, match=r"expected weights with values, got 0.weight on the meta device; load them"):
        controller.report()
    model.to_empty(device="cpu").load_state_dict(state)
    assert all(torch.equal(mask, masks[name]) for name, mask in controller.masks().items())
    baked = feather_param.baked_state_dict(model)
    model.to("meta").load_state_dict(baked, assign=True)
    assert all(torch.equal(model.get_submodule(name[:-7]).weight != 0, mask) for name, mask in masks.items())


@pytest.mark.parametrize(
    "call",
    [
        lambda model, controller: controller.refresh(),
        lambda model, controller: controller.report(),
        lambda model, controller: controller.masks(),
        lambda model, controller: controller.freeze(),
        lambda model, controller: feather_param.desparsify(model),
        lambda model, controller: feather_param.baked_state_dict(model),
    ],
)
def test_weights_without_values_are_refused(call):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
        controller = feather_param.sparsify(model, final_rate=0.9, total_steps=2, end_step=0)
    with pytest.raises(ValueError, match=r"expected weights with values, got 0\.weight on the meta device; load them"):
        call(model, controller)
    model.to_empty(device="cpu")
    for i in (0, 1):
        nn.init.normal_(model[i].parametrizations.weight.original)
    assert controller.report().zeros == round(0.9 * 800)

"""Models of which all weights or one weight have no values: a table of kinds and public functions.

A call works if it needs no values. Otherwise one sentence names the weight, and nothing changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import feather_param
from feather_param import allocations, inference, patterns, reports
from tests.core.models import sparsify_at_once
from tests.training import keys, zeros_in

INPUT = torch.ones(2, 20)


def linears() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20)).eval()


def built(whole: bool) -> tuple[nn.Sequential, feather_param.Controller]:
    """Return a model that was sparsified on the meta device, or of which one layer was."""
    model = linears()
    (model if whole else model[1]).to("meta")
    return model, sparsify_at_once(model, 0.9)


def moved(whole: bool, freeze: bool = False) -> tuple[nn.Sequential, feather_param.Controller]:
    """Return a model that was moved to the meta device after `sparsify`, or of which one layer was."""
    controller = sparsify_at_once(model := linears(), 0.9)
    if freeze:
        controller.freeze()
    (model if whole else model[1]).to("meta")
    return model, controller


def loaded() -> tuple[nn.Sequential, feather_param.Controller]:
    """Return a model that loaded a weight without values."""
    controller = sparsify_at_once(model := linears(), 0.9)
    name = "1.parametrizations.weight.original"
    model.load_state_dict({**model.state_dict(), name: torch.empty(20, 20, device="meta")}, assign=True)
    return model, controller


def freed() -> tuple[nn.Sequential, feather_param.Controller]:
    """Return a model in which the memory of a weight was freed."""
    controller = sparsify_at_once(model := linears(), 0.9)
    model[1].parametrizations.weight.original.untyped_storage().resize_(0)
    return model, controller


def fake() -> tuple[nn.Sequential, feather_param.Controller]:
    """Return a copy of a model whose weights are fake tensors."""
    controller = sparsify_at_once(model := linears(), 0.9)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for layer in model:
            own = layer.parametrizations.weight
            own.original = nn.Parameter(mode.from_tensor(own.original.detach()))
    return model, controller


KINDS: dict[str, Callable[[], tuple[nn.Sequential, feather_param.Controller]]] = {
    "all built on meta": lambda: built(True),
    "one built on meta": lambda: built(False),
    "all moved": lambda: moved(True),
    "one moved": lambda: moved(False),
    "frozen, all moved": lambda: moved(True, freeze=True),
    "frozen, one moved": lambda: moved(False, freeze=True),
    "one loaded": loaded,
    "one freed": freed,
    "fake": fake,
}
NEED_VALUES: dict[str, Callable[[nn.Sequential, feather_param.Controller], object]] = {
    "report": lambda model, controller: controller.report(),
    "masks": lambda model, controller: controller.masks(),
    "refresh": lambda model, controller: controller.refresh(),
    "desparsify": lambda model, controller: feather_param.desparsify(model),
    "controller.desparsify": lambda model, controller: controller.desparsify(),
    "baked_state_dict": lambda model, controller: feather_param.baked_state_dict(model),
    "History": lambda model, controller: reports.History(controller),
    "save_sparse": lambda model, controller: feather_param.save_sparse(model, "never written"),
    "multiply_adds": lambda model, controller: reports.multiply_adds(model, INPUT),
}
NEED_VALUES_UNLESS_FROZEN = {
    "freeze": lambda model, controller: controller.freeze(),
    "threshold": lambda model, controller: float(controller.threshold),
}
NEED_NONE: dict[str, Callable[[nn.Sequential, feather_param.Controller], object]] = {
    "step": lambda model, controller: controller.step(),
    "rate": lambda model, controller: (controller.rate, controller.step_count),
    "repr": lambda model, controller: repr(controller),
    "controller.state_dict": lambda model, controller: controller.state_dict(),
    "state_dict": lambda model, controller: model.state_dict(),
    "deepcopy": lambda model, controller: copy.deepcopy((model, controller)),
    "train": lambda model, controller: model.train().eval(),
    "follow": lambda model, controller: controller.follow(torch.optim.SGD(model.parameters(), lr=0.1)),
    "detach": lambda model, controller: controller.detach(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", NEED_VALUES | NEED_VALUES_UNLESS_FROZEN)
def test_a_call_that_needs_values_names_the_weight_without_and_changes_nothing(kind, call):
    model, controller = KINDS[kind]()
    before, step = keys(model), controller.step_count
    if call in NEED_VALUES_UNLESS_FROZEN and kind.startswith("frozen"):
        NEED_VALUES_UNLESS_FROZEN[call](model, controller)
        return
    with pytest.raises(
        RuntimeError, match=r"expected weights with values, got [01]\.(weight|bias) .*; load them first"
    ):
        (NEED_VALUES | NEED_VALUES_UNLESS_FROZEN)[call](model, controller)
    assert (keys(model), controller.step_count) == (before, step)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("one freed", "fake")])
@pytest.mark.parametrize("call", NEED_NONE)
def test_a_call_that_needs_no_values_works_on_the_meta_device(kind, call):
    NEED_NONE[call](*KINDS[kind]())


@pytest.mark.parametrize("kind", ["one built on meta", "one moved", "one loaded", "all built on meta"])
def test_the_zeros_are_exact_as_soon_as_all_weights_have_values(kind):
    model, controller = KINDS[kind]()
    controller.step()
    with pytest.raises(RuntimeError, match="expected weights with values"):
        controller.report()
    model.load_state_dict(linears().state_dict(), assign=True)
    model(INPUT)
    assert zeros_in(model) == controller.report().zeros == 720
    feather_param.desparsify(model)
    assert zeros_in(model) == 720


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("pattern", [None, patterns.n_m(1, 5), patterns.blocks(1, 4)], ids=str)
@pytest.mark.parametrize("name", ["global_magnitude", "uniform", "erk", "square_root", "lamp", "normalised"])
def test_plan_needs_shapes_only(whole, pattern, name):
    model = linears()
    (model if whole else model[1]).to("meta")
    plan = feather_param.plan(model, final_rate=0.8, pattern=pattern, allocation=getattr(allocations, name))
    assert plan.zeros == 640
    known = name in ("uniform", "erk", "square_root")
    assert sum(row.zeros or 0 for row in plan.rows) == (640 if known else 0)


def test_a_plain_model_with_one_weight_on_the_meta_device_cannot_be_measured():
    model = linears()
    model[1].to("meta")
    for call in (inference.to_sparse_inference, reports.multiply_adds):
        with pytest.raises(RuntimeError, match=r"expected weights with values, got 1\.weight on the meta device"):
            call(model, INPUT)


@pytest.mark.parametrize("norm", [lambda layer: layer, nn.utils.parametrizations.weight_norm], ids=["plain", "normed"])
def test_a_model_of_fake_tensors_is_refused_at_the_door(norm):
    with FakeTensorMode():
        model = nn.Sequential(norm(nn.Linear(20, 20)))
    for call in (sparsify_at_once, lambda model: feather_param.plan(model, final_rate=0.5)):
        with pytest.raises(ValueError, match=r"expected weights with values, or .*, got 0\.weight as a FakeTensor"):
            call(model)


@pytest.mark.parametrize("where", ["on the meta device", "as a FakeTensor"])
def test_a_state_without_values_is_refused(where):
    sparsify_at_once(model := linears())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    move = (lambda tensor: tensor.to("meta")) if where == "on the meta device" else mode.from_tensor
    state = {name: move(tensor) for name, tensor in model.state_dict().items()}
    for call in (feather_param.baked_state_dict, model.load_state_dict):
        with pytest.raises(
            (ValueError, RuntimeError), match=rf"expected .* with values, got .*_extra_state {where}; load"
        ):
            call(state)


@pytest.mark.parametrize("lazy", [nn.LazyLinear(20), nn.LazyConv2d(20, 3)], ids=lambda layer: type(layer).__name__)
def test_a_lazy_weight_is_refused_at_the_door_unless_it_stays_dense(lazy):
    model = nn.Sequential(nn.Linear(20, 20), lazy, nn.LazyBatchNorm1d())
    for call in (sparsify_at_once, lambda model: feather_param.plan(model, final_rate=0.5)):
        with pytest.raises(
            ValueError, match=r"expected initialised weights, got a lazy one at 1\.weight; run one batch"
        ):
            call(model)
    assert sparsify_at_once(model, exclude="1").report().zeros == 200


def test_a_lazy_norm_beside_pruned_weights_is_no_fault():
    model = nn.Sequential(nn.Linear(20, 20), nn.LazyBatchNorm1d())
    controller = sparsify_at_once(model)
    model(torch.randn(4, 20))
    assert controller.report().zeros == 200


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_built_on_the_meta_device_can_load_a_frozen_state(whole):
    sparsify_at_once(source := linears(), 0.9).freeze()
    model, controller = built(whole)
    model.load_state_dict(source.state_dict(), assign=True)
    assert float(controller.threshold) == 0  # the k-th magnitude of the loaded weights
    assert reports.History(controller).record().survivors == 80
    model.double()
    feather_param.desparsify(model)
    assert zeros_in(model) == 720


def test_an_allocation_gets_all_weights_without_values_if_one_has_none():
    seen = []

    def allocation(weights, zeros, guards):
        seen.append(torch.cat([weight.flatten() for weight in weights.values()]).device.type)
        return allocations.global_magnitude(weights, zeros, guards)

    model = linears()
    model[1].to("meta")
    controller = sparsify_at_once(model, allocation=allocation)
    controller.step()
    model.load_state_dict(linears().state_dict(), assign=True)
    controller.step()
    assert (seen[0], seen[-1]) == ("meta", "cpu")
    assert controller.report().zeros == 400

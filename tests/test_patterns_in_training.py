"""Trainings with patterns: schedules, resuming, copies, freezing, compiled code, transforms and guards."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

import feather_param
from feather_param import patterns
from feather_param.core.budget import Budget
from tests import twins
from tests.pattern_twins import TWINS, prune
from tests.test_patterns import at_once, dense, loss, net, quietly, train
from tests.training import same_state, zeros_in

FIT = ["blocks(1, 4)", "blocks(4, 1)", "n_m(2, 4)", "n_m(4, 8)"]
"""The patterns that divide the weights of `net`, of 768 elements."""


def build(name: str, seed: int = 0, **arguments):
    """Return a model, its optimizer and its controller."""
    model = net()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    arguments = {"final_rate": 0.49, "total_steps": 8, "pattern": TWINS[name][0], **arguments}
    return model, optimizer, feather_param.sparsify(model, **arguments)


def require_agreement(model: nn.Module, controller: feather_param.Controller, name: str, zeros: int) -> None:
    """Require that the evaluated, the reported and the baked network are the one that the twin prunes."""
    _, masks = prune(dense(model), zeros, TWINS[name][1])
    report = quietly(controller.report)
    assert report.zeros == zeros
    baked = feather_param.baked_state_dict(model)
    for row in report.rows:
        used = model.get_submodule(row.name.removesuffix(".weight")).weight
        assert torch.equal(controller.masks()[row.name], masks[row.name])
        assert torch.equal(baked[row.name] != 0, masks[row.name])
        assert (baked[row.name] - used).abs().max() < 1e-37


@pytest.mark.parametrize("name", FIT)
def test_each_step_of_a_schedule_has_the_largest_number_of_whole_units(name):
    model, optimizer, controller = build(name)
    pattern = TWINS[name][0]
    for step in range(10):
        train(model, controller, optimizer, [step])
        rate = twins.rate(step + 1, 0.49, 0, 4)
        require_agreement(model, controller, name, round(rate * 768) // pattern.size * pattern.size)
    feather_param.desparsify(model)
    assert zeros_in(model) == 376  # k = round(0.49 * 768), a multiple of 4


@pytest.mark.parametrize("name", FIT)
@pytest.mark.parametrize("frozen", [False, True], ids=["not frozen", "frozen"])
def test_a_resumed_run_has_the_same_losses_and_weights(name, frozen):
    first, again = build(name), build(name, seed=1)
    train(first[0], first[2], first[1], range(3))
    if frozen:
        first[2].freeze()
    train(first[0], first[2], first[1], range(3, 5))
    file = io.BytesIO()
    torch.save([each.state_dict() for each in first], file)
    losses = train(first[0], first[2], first[1], range(5, 10))
    file.seek(0)
    for each, state in zip(again, torch.load(file, weights_only=True), strict=True):
        each.load_state_dict(state)
    assert train(again[0], again[2], again[1], range(5, 10)) == losses
    assert same_state(first[0].state_dict(), again[0].state_dict())
    assert again[2].state_dict() == first[2].state_dict()


def test_the_state_of_a_controller_names_its_pattern():
    state = build("n_m(2, 4)")[2].state_dict()
    assert state["pattern"] == "n_m(2, 4)"
    with pytest.raises(ValueError, match=r"with pattern=blocks\(1, 4\), got n_m\(2, 4\); give sparsify the settings"):
        build("blocks(1, 4)")[2].load_state_dict(state)
    old = build("elements")[2].state_dict()
    assert old.pop("pattern") == "elements"
    build("elements")[2].load_state_dict(old)  # states of older releases have no pattern
    with pytest.raises(ValueError, match=r"with pattern=n_m\(2, 4\), got elements"):
        build("n_m(2, 4)")[2].load_state_dict(old)


@pytest.mark.parametrize("name", FIT)
def test_frozen_units_stay_pruned_and_kept(name):
    model, optimizer, controller = build(name)
    train(model, controller, optimizer, range(5))
    zeros, masks = controller.report().zeros, controller.masks()
    before = loss(model, 0)
    controller.freeze()
    assert torch.allclose(loss(model, 0), before)
    train(model, controller, optimizer, range(5, 8))
    assert controller.report().zeros == zeros
    feather_param.desparsify(model)
    for key, mask in masks.items():
        assert torch.equal(model.get_parameter(key) != 0, mask)


@pytest.mark.parametrize("name", FIT)
def test_copies_keep_their_zeros_and_moving_averages_follow_the_schedule(name):
    model, optimizer, controller = build(name)
    train(model, controller, optimizer, range(2))
    snapshot, average = copy.deepcopy(model), copy.deepcopy(model)
    zeros = controller.report().zeros
    train(model, controller, optimizer, range(2, 6))
    with torch.no_grad():
        for averaged, trained in zip(average.parameters(), model.parameters(), strict=True):
            averaged.lerp_(trained, 0.5)
    final = controller.report().zeros
    for copied, expected in ((snapshot, zeros), (average, final)):
        _, masks = prune(dense(copied), expected, TWINS[name][1])
        feather_param.desparsify(copied)
        for key, mask in masks.items():
            assert torch.equal(copied.get_parameter(key) != 0, mask)
    assert controller.report().zeros == final


@pytest.mark.parametrize("name", FIT)
def test_a_copy_of_one_layer_has_the_zeros_of_the_model(name):
    model, optimizer, controller = build(name)
    train(model, controller, optimizer, range(5))
    layer = copy.deepcopy(model[0])
    feather_param.desparsify(layer)
    assert torch.equal(layer.weight != 0, controller.masks()["0.weight"])


# -- compiled code and transforms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIT)
@pytest.mark.parametrize("theta", [1.0, 0.5, lambda rate: 1.5 - rate], ids=["1", "0.5", "a function"])
def test_one_compiled_graph_serves_all_steps(name, theta):
    torch._dynamo.reset()
    counters.clear()
    compiled, eager = build(name, theta=theta), build(name, theta=theta)
    forward = torch.compile(compiled[0], fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = train(forward, compiled[2], compiled[1], range(10))
    assert counters["stats"]["unique_graphs"] == 1
    assert losses == pytest.approx(train(eager[0], eager[2], eager[1], range(10)), rel=1e-4)


@pytest.mark.parametrize("name", ["blocks(1, 4)", "blocks(2, 3)", "n_m(2, 4)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:Skipping serialization")  # by the inductor of torch 2.6
def test_code_of_the_inductor_prunes_the_same_units_as_eager_code(name, dtype):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = nn.Linear(96, 96, dtype=dtype)
    controller = at_once(layer, TWINS[name][0])
    compiled = torch.compile(lambda: layer.weight.clone(), fullgraph=True)
    for _ in range(8):  # the threshold is the magnitude of a unit: a difference of one bit would keep this unit
        with torch.no_grad():
            layer.parametrizations.weight.original.normal_()
        controller.refresh()
        weight = compiled()
        assert torch.equal(weight != 0, layer.weight != 0)
        torch.testing.assert_close(weight, layer.weight)


@pytest.mark.parametrize("name", FIT)
@pytest.mark.parametrize("theta", [1.0, 0.5])
def test_function_transforms_give_the_gradients_of_eager_code(name, theta):
    model = net()
    at_once(model, TWINS[name][0], theta=theta)
    x = torch.randn(3, 16)
    parameters = dict(model.named_parameters())

    def total(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    gradients = torch.func.grad(total)(parameters, x)
    each = torch.func.vmap(torch.func.grad(total), in_dims=(None, 0))(parameters, x)
    model(x).square().sum().backward()
    for key, parameter in parameters.items():
        torch.testing.assert_close(gradients[key], parameter.grad)
        torch.testing.assert_close(each[key].sum(0), parameter.grad)


@pytest.mark.parametrize("name", FIT)
def test_models_can_be_stacked(name):
    models = [net() for _ in range(2)]
    with torch.no_grad():
        models[1][0].weight.mul_(2.0)
    for model in models:
        at_once(model, TWINS[name][0])
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(3, 16)
    base = copy.deepcopy(models[0]).to("meta")
    out = torch.func.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,)))(parameters, buffers)
    for i, model in enumerate(models):
        torch.testing.assert_close(out[i], model(x))


# -- settings ---------------------------------------------------------------------------------------------------------


def test_a_budget_counts_whole_units():
    budget = Budget({"a": 96, "b": 8}, max_rate=0.9, min_nonzero=3, unit=4)
    assert budget.guards == {"a": 84, "b": 4}
    assert budget.most == 88
    assert budget.zeros(0.5) == 52
    assert budget.zeros(0.49) == 48
    limited = Budget({"a": 96, "b": 8}, largest_rate=0.5)
    assert limited.guards == {"a": 48, "b": 4}
    assert limited.most == 52


@pytest.mark.parametrize("name", FIT)
def test_guards_limit_the_units_of_each_weight(name):
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(0.01)  # without a guard, all its units would be pruned first
    controller = at_once(model, TWINS[name][0], 0.3, max_rate_per_layer=0.4, min_nonzero_per_layer=10)
    rows = {row.name: row.zeros for row in controller.report().rows}
    size = TWINS[name][0].size
    assert rows["2.weight"] == int(0.4 * 256) // size * size
    assert sum(rows.values()) == round(0.3 * 768) // size * size
    feather_param.desparsify(model)
    assert twins.count_zeros([model[2].weight]) == rows["2.weight"]


@pytest.mark.parametrize("name", FIT)
def test_a_plan_has_the_zeros_of_the_report(name):
    model = net()
    plan = feather_param.plan(model, final_rate=0.37, pattern=TWINS[name][0])
    report = at_once(model, TWINS[name][0], 0.37).report()
    assert [row.zeros for row in plan.rows] == [row.zeros for row in report.rows]
    assert plan.zeros == report.zeros
    assert plan.largest_rate == (0.5 if name.startswith("n_m") else (768 - 4) / 768)


def test_a_plan_tells_that_a_pattern_does_not_reach_a_rate():
    plan = feather_param.plan(net(), final_rate=0.8, pattern=patterns.n_m(1, 2))
    assert not plan.reachable
    assert plan.largest_rate == 0.5


def test_a_report_names_the_pattern():
    assert "pattern: n_m(2, 4)" in str(at_once(net(), patterns.n_m(2, 4)).report())
    assert "pattern" not in str(at_once(net(), None).report())


@pytest.mark.parametrize("name", FIT)
def test_a_model_on_the_meta_device_can_be_sparsified_and_initialised_later(name):
    with torch.device("meta"):
        model = net()
    feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0, pattern=TWINS[name][0])
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model(torch.randn(2, 16))
    feather_param.desparsify(model)
    assert zeros_in(model) == 384


def test_recurrent_layers_and_parametrizations_of_other_libraries_work():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.LSTM(16, 8), torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 8))])
    controller = at_once(model, patterns.n_m(2, 4), include=["0.weight_*", "1"])
    model[0](torch.randn(3, 2, 16))
    assert {row.rate for row in controller.report().rows} == {0.5}
    feather_param.desparsify(model)
    for weight in (model[0].weight_ih_l0, model[0].weight_hh_l0, model[1].weight):
        assert ((weight.reshape(-1, 4) != 0).sum(1) == 2).all()

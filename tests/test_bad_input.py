"""Bad input: each refusal has a type and a message, and leaves model and controller untouched."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import feather_param
from tests.network import net, train_step

# -- arguments and models of sparsify ---------------------------------------------------------------------------------


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def with_integer_weight() -> nn.Module:
    model = net()
    model[3].weight = nn.Parameter(torch.ones(16, 128, dtype=torch.int32), requires_grad=False)
    return model


def with_old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.Sequential(nn.Linear(4, 4), nn.utils.weight_norm(nn.Linear(4, 4)))


def with_tensor_for_parameter() -> nn.Module:
    model = net()
    weight = model[4].weight.detach()
    del model[4].weight
    model[4].weight = weight
    return model


def with_value(value: float) -> nn.Module:
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0] = value
    return model


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch deprecate scripting
        return torch.jit.script(nn.Linear(4, 4))


def sparsified() -> nn.Module:
    model = net()
    feather_param.sparsify(model, final_rate=0.9, total_steps=4)
    return model


def wrapped(path: str, name: str) -> nn.Module:
    """Return a module with the class name of one of torch's wrappers. The wrappers themselves need processes."""
    wrapper = type(name, (nn.Sequential,), {"__module__": path})
    return wrapper(net())


def require_refused(model, arguments, error, message):
    """Check the error of sparsify, and that the model has the same classes and the same Parameters as before."""
    is_module = isinstance(model, nn.Module)
    before = structure(model) if is_module else None
    with pytest.raises(error, match="expected .*" + message):
        feather_param.sparsify(model, **{"final_rate": 0.9, "total_steps": 10, **arguments})
    assert not is_module or structure(model) == before


def structure(model: nn.Module) -> list:
    return [
        (name, type(module), [(key, id(p)) for key, p in module.named_parameters(recurse=False)])
        for name, module in model.named_modules()
    ]


ARGUMENTS = [
    ({"final_rate": 0.0}, ValueError, r"final_rate, the fraction of zeros, in \(0, 1\), got 0.0"),
    ({"final_rate": 1.0}, ValueError, r"final_rate, the fraction of zeros, in \(0, 1\), got 1.0"),
    ({"final_rate": 95}, ValueError, r"final_rate, .*, got 95.0; 95 % is 0.95"),
    ({"final_rate": -0.1}, ValueError, r"final_rate, .*, got -0.1"),
    ({"final_rate": float("nan")}, ValueError, r"final_rate, .*, got nan"),
    ({"final_rate": "0.9"}, TypeError, "final_rate to be a number, got '0.9'"),
    ({"final_rate": True}, TypeError, "final_rate to be a number, got True"),
    ({"final_rate": 0.9999}, ValueError, "final_rate that leaves a weight, got 0.9999 of 2328 weights"),
    ({"total_steps": 0}, ValueError, "total_steps to be at least 1, got 0"),
    ({"total_steps": 10.0}, TypeError, r"total_steps to be an int, got 10.0; wrap it in int\(\.\.\.\)"),
    ({"start_step": -1}, ValueError, "start_step to be at least 0, got -1"),
    ({"start_step": 6}, ValueError, r"start_step <= end_step <= total_steps, got 6, 5 and 10; end_step is total_steps"),
    ({"start_step": 4, "end_step": 3}, ValueError, "start_step <= end_step <= total_steps, got 4, 3 and 10"),
    ({"end_step": 11}, ValueError, "start_step <= end_step <= total_steps, got 0, 11 and 10"),
    ({"p": 0.0}, ValueError, "p > 0 or math.inf, got 0.0"),
    ({"p": -1.0}, ValueError, "p > 0 or math.inf, got -1.0"),
    ({"p": float("nan")}, ValueError, "p > 0 or math.inf, got nan"),
    ({"p": "3"}, TypeError, "p to be a number, got '3'"),
    ({"theta": -1}, ValueError, "theta to be a finite number >= 0, got -1"),
    ({"theta": float("inf")}, ValueError, "theta to be a finite number >= 0, got inf"),
    ({"theta": lambda rate: -rate}, ValueError, "theta to return a finite number >= 0, got -0.9 for the rate 0.9"),
    ({"theta": lambda rate: None}, ValueError, "theta to return a finite number >= 0, got None for the rate 0.0"),
    ({"theta": "half"}, TypeError, "theta to be a number, got 'half'"),
    ({"schedule": "cubic"}, TypeError, "schedule to be a callable of progress, got str"),
    ({"schedule": lambda progress: 2 * progress}, ValueError, r"schedule to return a fraction in \[0, 1\].*got 2.0"),
    ({"schedule": lambda progress: None}, ValueError, r"schedule to return a fraction in \[0, 1\].*got None"),
    ({"min_params": -1}, ValueError, "min_params to be at least 0, got -1"),
    ({"min_params": 10**6}, ValueError, "model with weights to prune, got Sequential with none"),
    ({"include": "nowhere.*"}, ValueError, r"include to match a weight, got 'nowhere.\*', .*names: 0.weight, 3.weight"),
    ({"include": "1.weight"}, ValueError, "include .*got '1.weight', .*; '1.weight' has fewer than two dimensions"),
    ({"exclude": ["fc"]}, ValueError, r"exclude to match a weight, got 'fc', which matches none"),
    ({"exclude": ["0", "fc", "head"]}, ValueError, r"exclude to match a weight, got 'fc', 'head', which matches none"),
    ({"include": ["3", "4", "5"]}, ValueError, r"include to match a weight, got '5', which matches none"),
    ({"include": lambda name, module: False}, ValueError, "include to match a weight"),
    ({"exclude": "*"}, ValueError, r"with none: 0.weight \(excluded\); 3.weight \(exc.*; 4"),
    ({"include": 3}, TypeError, "include to be globs or a predicate .*, got 3"),
    ({"include": nn.Linear}, TypeError, r"include .*, got the class Linear; use .*isinstance\(module, Linear\)"),
    ({"exclude": [nn.Linear]}, TypeError, "exclude to be globs or a predicate"),
    ({"exclude": []}, TypeError, "exclude to be globs or a predicate"),
    ({"optimizer": "sgd"}, TypeError, "optimizer to be a torch.optim.Optimizer, got str"),
    (
        {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(2))])},
        ValueError,
        "optimizer of this model's weights, got one that holds none of them",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "message"), ARGUMENTS)
def test_sparsify_refuses_a_bad_argument(arguments, error, message):
    require_refused(net(), arguments, error, message)


MODELS = [
    (lambda: torch.ones(3), TypeError, "model to be an nn.Module, got Tensor"),
    (
        lambda: nn.Sequential(nn.ReLU()),
        ValueError,
        "Sequential with none: it has no Linear or Conv layer, and no other",
    ),
    (
        lambda: with_value(float("nan")),
        ValueError,
        "got NaN or infinity in 3.weight; check the initialisation, or the check",
    ),
    (
        lambda: with_value(float("inf")),
        ValueError,
        "got NaN or infinity in 3.weight; check the initialisation, or the check",
    ),
    (scripted, ValueError, "model of plain modules, got RecursiveScriptModule at the root; sparsify before scripting"),
    (lambda: nn.Sequential(scripted()), ValueError, "model of plain modules, got RecursiveScriptModule at 0; sparsify"),
    (lambda: nn.Sequential(nn.LazyLinear(3)), ValueError, "initialised weights, got a lazy one at 0.weight; run one"),
    (with_integer_weight, ValueError, r"real floating dtype at 3.weight, got torch.int32; .*exclude='3.weight'"),
    (lambda: nn.Linear(3, 3, dtype=torch.complex64), ValueError, "real floating dtype at weight, got torch.complex64"),
    (
        with_old_weight_norm,
        ValueError,
        "1.weight to be an nn.Parameter, got .*; old-style weight_norm.*exclude='1.weight'",
    ),
    (with_tensor_for_parameter, ValueError, "4.weight to be an nn.Parameter, got Tensor"),
    (sparsified, ValueError, r"plain model, got one that is already sparsified \(at 0.weight\); call .*desparsify"),
    (
        lambda: wrapped("torch.nn.parallel.distributed", "DistributedDataParallel"),
        ValueError,
        "not yet wrapped, got DistributedDataParallel at the root; the order is: sparsify",
    ),
    (
        lambda: nn.Sequential(wrapped("torch.distributed.fsdp._fully_shard._fully_shard", "FSDPModule")),
        ValueError,
        "not yet wrapped, got FSDPModule at 0; the order is: sparsify",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), MODELS)
def test_sparsify_refuses_a_model_that_cannot_be_pruned(make, error, message):
    require_refused(make(), {}, error, message)


def test_sparsify_refuses_to_include_only_one_place_of_a_tied_weight():
    message = r"all the places of a tied weight, got 1.weight without 0.weight; .*include=\['0.weight', '1.weight'\]"
    require_refused(tied(), {"include": "1"}, ValueError, message)
    proposed = ["0.weight", "1.weight"]
    feather_param.sparsify(tied(), final_rate=0.5, total_steps=1, include=proposed)


# -- desparsify -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "thing"),
    [
        *((feather_param.desparsify, thing) for thing in ("controller", None, {"weight": torch.ones(2, 2)})),
        *((feather_param.baked_state_dict, thing) for thing in ("controller", None)),  # it also takes a state_dict
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_only_a_model_can_be_baked(call, thing):
    if thing == "controller":
        thing = feather_param.sparsify(net(), final_rate=0.9, total_steps=4)
    with pytest.raises(TypeError, match=f"expected model to be an nn.Module, got {type(thing).__name__}"):
        call(thing)


def test_a_controller_refuses_all_calls_after_desparsify():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=4, end_step=0)
    state = controller.state_dict()
    controller.desparsify()
    for call in (controller.step, controller.report, controller.desparsify, lambda: controller.load_state_dict(state)):
        with pytest.raises(RuntimeError, match=r"expected \w+\(\) before desparsify, got it after: the model is plain"):
            call()


def test_an_optimizer_that_steps_a_baked_model_causes_one_warning():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    feather_param.sparsify(model, final_rate=0.9, total_steps=4, end_step=0, optimizer=optimizer)
    feather_param.desparsify(model)
    with pytest.warns(UserWarning, match=r"stepped a model that was desparsified.* its zeros are lost; build a new"):
        train_step(model, optimizer, 0)
    train_step(model, optimizer, 1)  # warnings are errors in these tests


# -- saved states of a controller -------------------------------------------------------------------------------------


STATES = [
    (lambda state: None, "state_dict of a feather_param Controller, got something else"),
    (lambda state: {}, "state_dict of a feather_param Controller, got something else"),
    (lambda state: {**state, "version": 99}, "state of version 1, got 99; load it with the feather_param release"),
    (lambda state: {**state, "final_rate": 0.8}, "final_rate=0.9, got 0.8; give sparsify the settings of the run"),
    (lambda state: {**state, "end_step": 1}, "end_step=2, got 1"),
    (
        lambda state: {**state, "schedule": [0.0, 0.25, 0.5, 0.75, 1.0]},
        r"\[0.0, 0.57.* at progress 0.0, 0.25.*, got \[0.0, 0.25",
    ),
    (lambda state: {**state, "total_steps": 8, "end_step": 4}, r"total_steps=4 \(end_step=2\), got 8 \(end_step=4\)"),
    (lambda state: {**state, "frozen_step": -1}, "frozen_step to be at least 0"),
    (lambda state: {**state, "theta": 0.5}, "theta=1.0, got 0.5"),
    (lambda state: {**state, "theta": [1.0, 1.0, 1.0, 0.5, 0.5]}, r"theta=1.0, got \[1.0, 1.0"),
    (
        lambda state: {**state, "weights": {**state["weights"], "3.weight": [16, 99]}},
        r"of this model, got another's: 3.weight has shape \[16, 128\] here and \[16, 99\] there",
    ),
    (lambda state: {**state, "weights": {**state["weights"], "9.weight": None}}, "has shape none here and None there"),
    (
        lambda state: {**state, "weights": {**state["weights"], "9.weight": "none"}},
        "9.weight has shape none here and n",
    ),
    (lambda state: {**state, "weights": {}}, r"0.weight has shape \[8, 3, 3, 3\] here and none there"),
    (
        lambda state: {**state, "weights": {**state["weights"], "9.weight": [1]}},
        r"9.weight has shape none here and \[1\] there",
    ),
    (lambda state: {**state, "step_count": -1}, "step_count to be at least 0"),
]


@pytest.mark.parametrize(("change", "message"), STATES)
def test_a_controller_refuses_the_state_of_another_run(change, message):
    controller = feather_param.sparsify(net(), final_rate=0.9, total_steps=4)
    controller.step()
    before = controller.state_dict()
    with pytest.raises(ValueError, match="expected .*" + message):
        controller.load_state_dict(change(before))
    assert controller.state_dict() == before


@pytest.mark.parametrize(
    "arguments",
    [{}, {"include": "nowhere"}, {"min_params": 10**6}, {"final_rate": 2.0}],
    ids=lambda arguments: ", ".join(arguments),
)
@pytest.mark.parametrize("function", [feather_param.sparsify, feather_param.plan])
def test_a_sparsified_model_is_refused_first_and_its_thresholds_do_not_change(function, arguments):
    if function is feather_param.plan and "final_rate" in arguments:
        pytest.skip("plan checks the rate before it looks at the model")
    model = net()
    feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0)
    feather = model[0].parametrizations.weight[0]
    with torch.no_grad():
        model[0].parametrizations.weight.original.mul_(2.0)  # the next forward pass would refresh
    before = feather.threshold.clone()
    settings = {"final_rate": 0.5, **({"total_steps": 1} if function is feather_param.sparsify else {}), **arguments}
    with pytest.raises(ValueError, match="already sparsified"):
        function(model, **settings)
    assert torch.equal(feather.threshold, before)

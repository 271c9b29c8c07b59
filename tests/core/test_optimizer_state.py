"""States of optimizers that were built on different sides of `sparsify`: they are sorted by name, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import feather_param
from tests.core.optimizer_runs import Run, equal_states, random_conv_net


class TwoMatrices(nn.Module):
    """Two parameters of the same shape. `sparsify` moves the first behind the second."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(4, 4))
        self.w2 = nn.Parameter(torch.randn(4, 4))


class TwoMatricesAndChild(TwoMatrices):
    """`sparsify` moves the first parameter behind those of the child, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)


MODELS = {
    "convolutional": (random_conv_net, "*"),
    "two of one shape": (TwoMatrices, "w1"),
    "child": (TwoMatricesAndChild, "w1"),
    "the first of two layers": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), "0"),
    "LSTM": (lambda: nn.LSTM(4, 4, bias=False), "weight_ih_l0"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), ["*", "in_proj_weight"]),
}

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adamax": torch.optim.Adamax,
    "Adadelta": torch.optim.Adadelta,
    "Adagrad": torch.optim.Adagrad,
    "Adafactor": torch.optim.Adafactor,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
}

SIDES = [True, False]
SIDE_NAMES = ["built before", "built after"]


# -- followed optimizers sort the states that they load


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("saver_built_first", SIDES, ids=SIDE_NAMES)
@pytest.mark.parametrize("loader_built_first", SIDES, ids=SIDE_NAMES)
def test_a_state_is_loaded_into_the_parameters_of_the_same_names(
    model, optimizer, saver_built_first, loader_built_first
):
    make, include = model
    first = Run(make, optimizer, built_first=saver_built_first, include=include).follow().train()
    second = Run(make, optimizer, built_first=loader_built_first, include=include).follow()
    second.optimizer.load_state_dict(first.saved())
    assert second.has_states_of(first)
    second.train()
    third = Run(make, optimizer, built_first=not loader_built_first, include=include).follow()
    third.optimizer.load_state_dict(second.saved())
    assert third.has_states_of(second)


class Tree(nn.Module):
    """A module with parameters of given shapes, and children that are given as (shapes, children)."""

    def __init__(self, shapes, children) -> None:
        super().__init__()
        for i, shape in enumerate(shapes):
            setattr(self, f"p{i}", nn.Parameter(torch.randn(shape)))
        for i, child in enumerate(children):
            setattr(self, f"c{i}", Tree(*child))


SHAPES = st.lists(st.sampled_from([(2, 2), (2, 2), (3, 2), (2,)]), max_size=3)
TREES = st.recursive(
    st.tuples(SHAPES, st.just([])), lambda child: st.tuples(SHAPES, st.lists(child, max_size=2)), max_leaves=4
)


@given(data=st.data(), tree=TREES, built_first=st.tuples(st.booleans(), st.booleans()), named=st.booleans())
@settings(max_examples=300)
@pytest.mark.filterwarnings("ignore:nothing survives")
def test_the_state_of_any_model_is_loaded_into_the_right_parameters_or_refused(data, tree, built_first, named):
    def make():
        model = Tree(*tree)
        if tied:
            model.c9 = Tree([], [])
            model.c9.p0 = model.get_parameter(tied)
        return model

    tied = None  # name of a parameter that is used a second time
    dims = {name: parameter.dim() for name, parameter in make().named_parameters()}
    matrices = [name for name in dims if dims[name] == 2]
    assume(matrices)
    include = data.draw(st.lists(st.sampled_from(matrices), min_size=1, unique=True))
    if not data.draw(st.integers(0, 3)):
        tied = data.draw(st.sampled_from(matrices))
        include = [*include, "c9.p0", tied]
    in_first_group = {name: data.draw(st.booleans()) for name in dims}
    reverse, foreign = data.draw(st.booleans()), data.draw(st.booleans())

    def prepare(parameters, names):
        parameters = parameters[::-1] if reverse else parameters
        groups = [[p for p in parameters if in_first_group[names[p]] == value] for value in (True, False)]
        others = [nn.Parameter(torch.randn(2, 2))] if foreign else []
        return [{"params": others + groups[0]}, {"params": groups[1]}]

    saver, loader = (
        Run(make, OPTIMIZERS["SGD"], built_first=side, include=include, prepare=prepare) for side in built_first
    )
    if named:
        saver.follow()
    saver.train()
    loader.follow()
    try:
        loader.optimizer.load_state_dict(saver.saved())
    except ValueError:
        assert not named
        assert not loader.optimizer.state
    else:
        assert loader.has_states_of(saver)


def test_parameters_of_no_model_keep_their_positions():
    def add_foreign(parameters, names):
        return [nn.Parameter(torch.randn(3)), *parameters, nn.Parameter(torch.randn(3))]

    first = Run(TwoMatrices, torch.optim.Adam, built_first=True, include="w1", prepare=add_foreign).follow()
    foreign = {i: first.optimizer.param_groups[0]["params"][i] for i in (0, -1)}
    for parameter in foreign.values():
        parameter.grad = torch.randn(3)
    first.train()
    second = Run(TwoMatrices, torch.optim.Adam, built_first=False, include="w1", prepare=add_foreign).follow()
    second.optimizer.load_state_dict(first.saved())
    assert second.has_states_of(first)
    for i, parameter in foreign.items():
        same_position = second.optimizer.param_groups[0]["params"][i]
        assert equal_states(second.optimizer.state[same_position], first.optimizer.state[parameter])


def test_the_state_of_an_optimizer_with_two_models_is_sorted_for_both():
    def build(built_first):
        models = [TwoMatrices(), TwoMatrices()]
        names = {p: (i, name) for i, model in enumerate(models) for name, p in model.named_parameters()}
        if built_first:
            optimizer = torch.optim.Adam([p for model in models for p in model.parameters()])
        controllers = [feather_param.sparsify(m, final_rate=0.5, total_steps=4, include="w1") for m in models]
        if not built_first:
            optimizer = torch.optim.Adam([p for model in models for p in model.parameters()])
        for controller in controllers:
            controller.follow(optimizer)
        return names, optimizer, controllers

    names, optimizer, controllers = build(True)
    for parameter in names:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert [controller.step_count for controller in controllers] == [1, 1]
    other_names, other, _ = build(False)
    other.load_state_dict(optimizer.state_dict())
    states = {names[p]: state for p, state in optimizer.state.items()}
    assert all(equal_states(state, states[other_names[p]]) for p, state in other.state.items())
    assert len(other.state) == len(states)


def test_a_layer_wrapped_by_torch_compile_has_the_same_names_in_the_state():
    first = Run(random_conv_net, torch.optim.Adam, built_first=False).follow().train()
    second = Run(random_conv_net, torch.optim.Adam, built_first=True)
    second.model[3] = torch.compile(second.model[3], backend="eager")
    second.follow()
    assert second.saved()["feather_param"] == [[[second.names[p] for p in second.names]]]
    second.optimizer.load_state_dict(first.saved())
    assert second.has_states_of(first)


def test_a_layer_with_weight_norm_has_the_same_names_in_the_state():
    def make():
        model = random_conv_net()
        nn.utils.parametrizations.weight_norm(model[3])
        return model

    first = Run(make, torch.optim.Adam, built_first=True).follow().train()
    second = Run(make, torch.optim.Adam, built_first=False).follow()
    second.optimizer.load_state_dict(first.saved())
    assert second.has_states_of(first)


def test_an_optimizer_that_is_not_followed_loads_a_state_with_names_and_does_not_save_them():
    first = Run(random_conv_net, torch.optim.Adam, built_first=False).follow().train()
    state = first.saved()
    assert state["feather_param"][0][0][:2] == ["0.bias", "0.weight"]
    second = Run(random_conv_net, torch.optim.Adam, built_first=False)
    second.optimizer.load_state_dict(state)
    assert second.has_states_of(first)
    plain = torch.optim.Adam(nn.Linear(1, 1).parameters())
    assert second.optimizer.param_groups[0].keys() == plain.param_groups[0].keys()
    second.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert set(second.optimizer.state_dict()) == {"state", "param_groups"}


# -- names that torch saved


@pytest.mark.parametrize("built_first", SIDES, ids=SIDE_NAMES)
def test_a_state_is_sorted_by_the_names_that_torch_saved(built_first):
    def build(built_first, prefix=""):
        model = TwoMatrices()
        names = {parameter: name for name, parameter in model.named_parameters()}
        if built_first:
            optimizer = torch.optim.Adam((prefix + name, p) for name, p in model.named_parameters())
        controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, include="w1")
        if not built_first:
            optimizer = torch.optim.Adam((prefix + name, p) for name, p in model.named_parameters())
        for parameter in names:
            parameter.grad = torch.randn_like(parameter)
        return names, optimizer, controller

    names, saver, _ = build(not built_first, prefix="module.")
    saver.step()
    state = saver.state_dict()
    assert "feather_param" not in state
    other_names, loader, controller = build(built_first)
    controller.follow(loader)
    loader.load_state_dict(state)
    states = {names[p]: value for p, value in saver.state.items()}
    assert all(equal_states(value, states[other_names[p]]) for p, value in loader.state.items())
    (group,) = loader.param_groups
    for parameter, name in zip(group["params"], group["param_names"], strict=True):
        plain = name.replace("parametrizations.w1.original", "w1")
        assert plain == "module." + other_names[parameter]  # torch replaces the names by the loaded ones


def test_a_state_is_sorted_by_the_names_of_torch_distributed_checkpoint():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    first = Run(TwoMatrices, torch.optim.Adam, built_first=True, include="w1").follow().train()
    state = get_optimizer_state_dict(first.model, first.optimizer)
    assert "feather_param" not in state
    for built_first in SIDES:
        second = Run(TwoMatrices, torch.optim.Adam, built_first=built_first, include="w1").follow()
        set_optimizer_state_dict(second.model, second.optimizer, copy.deepcopy(state))
        assert second.has_states_of(first)
        third = Run(TwoMatrices, torch.optim.Adam, built_first=built_first, include="w1").follow()
        third.optimizer.load_state_dict(copy.deepcopy(state))
        assert third.has_states_of(first)


# -- states that cannot be sorted


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("built_first", SIDES, ids=SIDE_NAMES)
def test_a_state_without_names_loads_only_before_the_optimizer_is_followed(model, built_first):
    make, include = model
    first = Run(make, torch.optim.Adam, built_first=built_first, include=include).train()
    second = Run(make, torch.optim.Adam, built_first=built_first, include=include).follow().train()
    before = copy.deepcopy(second)
    with pytest.raises(ValueError, match=r"an optimizer state with the names .* got one without names.*before or"):
        second.optimizer.load_state_dict(first.saved())
    assert second.has_states_of(before)
    third = Run(make, torch.optim.Adam, built_first=built_first, include=include)
    third.optimizer.load_state_dict(first.saved())  # the message proposes this
    third.follow()
    assert third.has_states_of(first)


def test_a_state_of_parameters_in_reverse_order_loads_only_with_names():
    def reverse(parameters, names):
        return parameters[::-1]

    first = Run(random_conv_net, torch.optim.Adam, built_first=True, prepare=reverse).train()
    second = Run(random_conv_net, torch.optim.Adam, built_first=False, prepare=reverse).follow()
    with pytest.raises(ValueError, match="got one without names"):
        second.optimizer.load_state_dict(first.saved())
    second.optimizer.load_state_dict(first.follow().saved())
    assert second.has_states_of(first)


def test_a_state_without_tensors_loads_without_names():
    for make, include in MODELS.values():
        first = Run(make, lambda p: torch.optim.SGD(p, lr=0.3), built_first=True, include=include).train()
        second = Run(make, lambda p: torch.optim.SGD(p, lr=0.1), built_first=False, include=include).follow()
        second.optimizer.load_state_dict(first.saved())
        assert second.optimizer.param_groups[0]["lr"] == 0.3


def test_a_state_with_the_same_parameters_in_other_groups_is_refused():
    def split_at(i):
        return lambda parameters, names: [{"params": parameters[:i]}, {"params": parameters[i:]}]

    def other_groups(parameters, names):
        return [{"params": parameters[2:4]}, {"params": parameters[:2] + parameters[4:]}]

    first = Run(random_conv_net, torch.optim.Adam, built_first=True, prepare=split_at(2)).follow().train()
    second = Run(random_conv_net, torch.optim.Adam, built_first=True, prepare=other_groups).follow()
    with pytest.raises(
        ValueError, match=r"expected .* parameter groups of this optimizer, got the same .*other groups"
    ):
        second.optimizer.load_state_dict(first.saved())
    third = Run(random_conv_net, torch.optim.Adam, built_first=True, prepare=split_at(3)).follow()
    with pytest.raises(ValueError, match="doesn't match the size"):  # a message of torch
        third.optimizer.load_state_dict(first.saved())


def test_a_state_of_lbfgs_loads_only_in_the_same_order():
    first = Run(TwoMatrices, torch.optim.LBFGS, built_first=True, include="w1").follow()
    first.optimizer.step(lambda: sum(p.square().sum() for p in first.model.parameters()).backward() or 1.0)
    second = Run(TwoMatrices, torch.optim.LBFGS, built_first=False, include="w1").follow()
    with pytest.raises(ValueError, match="expected an LBFGS state in this optimizer's order of parameters"):
        second.optimizer.load_state_dict(first.saved())
    third = Run(TwoMatrices, torch.optim.LBFGS, built_first=True, include="w1").follow()
    third.optimizer.load_state_dict(first.saved())
    assert third.states.keys() == first.states.keys()

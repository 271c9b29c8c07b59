"""Following an optimizer, and what happens to the states that it saves and loads."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import feather_param

sgd = torch.optim.SGD


class Pair(nn.Module):
    """Two parameters of one shape, the first of which moves behind the second."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(4, 4))
        self.w2 = nn.Parameter(torch.randn(4, 4))


class Parent(Pair):
    """One whose parameter also moves behind those of a child."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 16), nn.Linear(16, 4))


MODELS = {
    "net": (net, "*"),
    "two of one shape": (Pair, "w1"),
    "child": (Parent, "w1"),
    "the first of two": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), "0"),
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


class Run:
    """A model, sparsified before or after its optimizer was built, and the names that its parameters had at first."""

    def __init__(self, make, optimizer, *, built_first: bool, include="*", prepare=None):
        self.model = make()
        self.names = {parameter: name for name, parameter in self.model.named_parameters()}
        prepare = prepare or (lambda parameters, names: parameters)
        if built_first:
            self.optimizer = optimizer(prepare(list(self.model.parameters()), self.names))
        self.controller = feather_param.sparsify(self.model, final_rate=0.5, total_steps=9, include=include)
        if not built_first:
            self.optimizer = optimizer(prepare(list(self.model.parameters()), self.names))

    def follow(self) -> Run:
        self.controller.follow(self.optimizer)
        return self

    def trained(self) -> Run:
        for _ in range(2):
            for parameter in self.names:
                parameter.grad = torch.randn_like(parameter)
            self.optimizer.step()
        return self

    def saved(self) -> dict:
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    @property
    def states(self) -> dict[str, dict]:
        return {self.names.get(parameter, "stranger"): state for parameter, state in self.optimizer.state.items()}

    def has_states_of(self, other: Run) -> bool:
        mine, theirs = self.states, other.states
        return mine.keys() == theirs.keys() and all(same(mine[name], theirs[name]) for name in mine)


def same(one: dict, other: dict) -> bool:
    def equal(a, b):
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)


SIDES = [True, False]
SIDE_NAMES = ["built before", "built after"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("saved_first", SIDES, ids=SIDE_NAMES)
@pytest.mark.parametrize("loaded_first", SIDES, ids=SIDE_NAMES)
def test_a_state_finds_its_parameters_by_name(model, optimizer, saved_first, loaded_first):
    make, include = model
    first = Run(make, optimizer, built_first=saved_first, include=include).follow().trained()
    second = Run(make, optimizer, built_first=loaded_first, include=include).follow()
    second.optimizer.load_state_dict(first.saved())
    assert second.has_states_of(first)
    second.trained()
    third = Run(make, optimizer, built_first=not loaded_first, include=include).follow()
    third.optimizer.load_state_dict(second.saved())
    assert third.has_states_of(second)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("built_first", SIDES, ids=SIDE_NAMES)
def test_a_state_without_names_is_refused(model, built_first):
    make, include = MODELS[model]
    first = Run(make, torch.optim.Adam, built_first=built_first, include=include).trained()
    second = Run(make, torch.optim.Adam, built_first=built_first, include=include).follow().trained()
    before = copy.deepcopy(second)
    with pytest.raises(ValueError, match=r"expected an optimizer state that tells .* got one without names.*before or"):
        second.optimizer.load_state_dict(first.saved())
    assert second.has_states_of(before)
    other = Run(make, torch.optim.Adam, built_first=built_first, include=include)
    other.optimizer.load_state_dict(first.saved())  # what the message proposes
    other.follow()
    assert other.has_states_of(first)


def test_a_state_in_an_order_of_ones_own():
    def backwards(parameters, names):
        return parameters[::-1]

    first = Run(net, torch.optim.Adam, built_first=True, prepare=backwards).trained()
    second = Run(net, torch.optim.Adam, built_first=False, prepare=backwards).follow()
    with pytest.raises(ValueError, match="got one without names"):
        second.optimizer.load_state_dict(first.saved())
    second.optimizer.load_state_dict(first.follow().saved())
    assert second.has_states_of(first)


def test_a_state_that_is_empty_has_no_order():
    for make, include in MODELS.values():
        first = Run(make, lambda p: sgd(p, lr=0.3), built_first=True, include=include).trained()
        second = Run(make, lambda p: sgd(p, lr=0.1), built_first=False, include=include).follow()
        second.optimizer.load_state_dict(first.saved())
        assert second.optimizer.param_groups[0]["lr"] == 0.3


class Tree(nn.Module):
    """A module of given parameters and children, as (shapes, children)."""

    def __init__(self, shapes, children) -> None:
        super().__init__()
        for at, shape in enumerate(shapes):
            setattr(self, f"p{at}", nn.Parameter(torch.randn(shape)))
        for at, child in enumerate(children):
            setattr(self, f"c{at}", Tree(*child))


SHAPES = st.lists(st.sampled_from([(2, 2), (2, 2), (3, 2), (2,)]), max_size=3)
TREES = st.recursive(
    st.tuples(SHAPES, st.just([])), lambda child: st.tuples(SHAPES, st.lists(child, max_size=2)), max_leaves=4
)


@given(data=st.data(), tree=TREES, built_first=st.tuples(st.booleans(), st.booleans()), named=st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_state_lands_right_or_is_refused(data, tree, built_first, named):
    def make():
        model = Tree(*tree)
        if model_tied:
            model.c9 = Tree([], [])
            model.c9.p0 = model.get_parameter(model_tied)
        return model

    model_tied = None
    names = {name: parameter.dim() for name, parameter in make().named_parameters()}
    matrices = [name for name, dims in names.items() if dims == 2]
    assume(matrices)
    include = data.draw(st.lists(st.sampled_from(matrices), min_size=1, unique=True))
    if not data.draw(st.integers(0, 3)):
        model_tied = data.draw(st.sampled_from(matrices))
        include = [*include, "c9.p0", model_tied]
    first = {name: data.draw(st.booleans()) for name in names}
    backwards, strangers = data.draw(st.booleans()), data.draw(st.booleans())

    def prepare(parameters, names):
        parameters = parameters[::-1] if backwards else parameters
        groups = [[p for p in parameters if first[names[p]] == value] for value in (True, False)]
        others = [nn.Parameter(torch.randn(2, 2))] if strangers else []
        return [{"params": others + groups[0]}, {"params": groups[1]}]

    saver, loader = (
        Run(make, OPTIMIZERS["SGD"], built_first=side, include=include, prepare=prepare) for side in built_first
    )
    if named:
        saver.follow()
    saver.trained()
    loader.follow()
    try:
        loader.optimizer.load_state_dict(saver.saved())
    except ValueError:
        assert not named
        assert not loader.optimizer.state
    else:
        assert loader.has_states_of(saver)


def test_parameters_that_are_not_the_models_stay_where_they_are():
    def both(parameters, names):
        return [nn.Parameter(torch.randn(3)), *parameters, nn.Parameter(torch.randn(3))]

    first = Run(Pair, torch.optim.Adam, built_first=True, include="w1", prepare=both).follow()
    strangers = [first.optimizer.param_groups[0]["params"][at] for at in (0, -1)]
    for stranger in strangers:
        stranger.grad = torch.randn(3)
    first.trained()
    second = Run(Pair, torch.optim.Adam, built_first=False, include="w1", prepare=both).follow()
    second.optimizer.load_state_dict(first.saved())
    assert second.has_states_of(first)
    for stranger, at in zip(strangers, (0, -1), strict=True):
        mine = second.optimizer.param_groups[0]["params"][at]
        assert same(second.optimizer.state[mine], first.optimizer.state[stranger])


def test_two_models_of_one_optimizer():
    def build(built_first):
        models = [Pair(), Pair()]
        names = {p: (at, name) for at, model in enumerate(models) for name, p in model.named_parameters()}
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
    others, other, _ = build(False)
    other.load_state_dict(optimizer.state_dict())
    states = {names[p]: state for p, state in optimizer.state.items()}
    assert all(same(state, states[others[p]]) for p, state in other.state.items())
    assert len(other.state) == len(states)


def test_the_same_parameters_in_other_groups_are_refused():
    def split(at):
        return lambda parameters, names: [{"params": parameters[:at]}, {"params": parameters[at:]}]

    def swap(parameters, names):
        return [{"params": parameters[2:4]}, {"params": parameters[:2] + parameters[4:]}]

    def keep(parameters, names):
        return [{"params": parameters[:2]}, {"params": parameters[2:]}]

    first = Run(net, torch.optim.Adam, built_first=True, prepare=keep).follow().trained()
    second = Run(net, torch.optim.Adam, built_first=True, prepare=swap).follow()
    with pytest.raises(
        ValueError, match=r"expected .* parameter groups of this optimizer, got the same .*other groups"
    ):
        second.optimizer.load_state_dict(first.saved())
    third = Run(net, torch.optim.Adam, built_first=True, prepare=split(3)).follow()
    with pytest.raises(ValueError, match="doesn't match the size"):  # torch's own
        third.optimizer.load_state_dict(first.saved())


def test_the_state_of_lbfgs_cannot_be_sorted():
    first = Run(Pair, torch.optim.LBFGS, built_first=True, include="w1").follow()
    first.optimizer.step(lambda: sum(p.square().sum() for p in first.model.parameters()).backward() or 1.0)
    other = Run(Pair, torch.optim.LBFGS, built_first=False, include="w1").follow()
    with pytest.raises(ValueError, match="expected an LBFGS state in this optimizer's order of parameters"):
        other.optimizer.load_state_dict(first.saved())
    alike = Run(Pair, torch.optim.LBFGS, built_first=True, include="w1").follow()
    alike.optimizer.load_state_dict(first.saved())
    assert alike.states.keys() == first.states.keys()


@pytest.mark.parametrize("built_first", SIDES, ids=SIDE_NAMES)
def test_names_that_torch_saves_serve_as_well(built_first):
    def build(built_first, prefix=""):
        model = Pair()
        names = {parameter: name for name, parameter in model.named_parameters()}
        if built_first:
            optimizer = torch.optim.Adam((prefix + name, p) for name, p in model.named_parameters())
        controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, include="w1")
        if not built_first:
            optimizer = torch.optim.Adam((prefix + name, p) for name, p in model.named_parameters())
        for parameter in names:
            parameter.grad = torch.randn_like(parameter)
        return names, optimizer, controller

    names, saved, _ = build(not built_first, prefix="module.")
    saved.step()
    state = saved.state_dict()
    assert "feather_param" not in state
    others, optimizer, controller = build(built_first)
    controller.follow(optimizer)
    optimizer.load_state_dict(state)
    states = {names[p]: value for p, value in saved.state.items()}
    assert all(same(value, states[others[p]]) for p, value in optimizer.state.items())
    (group,) = optimizer.param_groups
    for parameter, name in zip(group["params"], group["param_names"], strict=True):
        plain = name.replace("parametrizations.w1.original", "w1")
        assert plain == "module." + others[parameter]  # torch takes over the names that it loads, in the right order


def test_the_distributed_checkpoints_names_serve_as_well():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    first = Run(Pair, torch.optim.Adam, built_first=True, include="w1").follow().trained()
    state = get_optimizer_state_dict(first.model, first.optimizer)
    assert "feather_param" not in state
    for built_first in SIDES:
        second = Run(Pair, torch.optim.Adam, built_first=built_first, include="w1").follow()
        set_optimizer_state_dict(second.model, second.optimizer, copy.deepcopy(state))
        assert second.has_states_of(first)
        third = Run(Pair, torch.optim.Adam, built_first=built_first, include="w1").follow()
        third.optimizer.load_state_dict(copy.deepcopy(state))
        assert third.has_states_of(first)


def test_names_do_not_stay_in_an_optimizer():
    first = Run(net, torch.optim.Adam, built_first=False).follow().trained()
    state = first.saved()
    assert state["feather_param"][0][0][:2] == ["0.bias", "0.weight"]
    second = Run(net, torch.optim.Adam, built_first=False)
    second.optimizer.load_state_dict(state)  # nobody follows it: torch overlooks the names
    assert second.has_states_of(first)
    assert (
        second.optimizer.param_groups[0].keys() == torch.optim.Adam(nn.Linear(1, 1).parameters()).param_groups[0].keys()
    )
    second.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert set(second.optimizer.state_dict()) == {"state", "param_groups"}


def test_wrappers_within_the_model_do_not_change_names():
    first = Run(net, torch.optim.Adam, built_first=False).follow().trained()
    second = Run(net, torch.optim.Adam, built_first=True)
    second.model[3] = torch.compile(second.model[3], backend="eager")
    second.follow()
    assert second.saved()["feather_param"] == [[[second.names[p] for p in second.names]]]
    second.optimizer.load_state_dict(first.saved())
    assert second.has_states_of(first)


def test_another_librarys_parametrization_moves_nothing():
    def make():
        model = net()
        nn.utils.parametrizations.weight_norm(model[3])
        return model

    first = Run(make, torch.optim.Adam, built_first=True).follow().trained()
    second = Run(make, torch.optim.Adam, built_first=False).follow()
    second.optimizer.load_state_dict(first.saved())
    assert second.has_states_of(first)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 3, 6, 6)).sum().backward()
    optimizer.step()


def hooks(optimizer: torch.optim.Optimizer) -> list[int]:
    return [
        len(optimizer._optimizer_step_post_hooks),
        len(optimizer._optimizer_state_dict_post_hooks),
        len(optimizer._optimizer_load_state_dict_pre_hooks),
    ]


def test_following_the_same_optimizer_again_counts_once():
    model = net()
    optimizer = sgd(model.parameters(), lr=0.1)
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, optimizer=optimizer)
    controller.follow(optimizer)
    step(model, optimizer)
    assert controller.step_count == 1
    assert hooks(optimizer) == [1, 1, 1]


def test_following_another_optimizer_leaves_the_first():
    model = net()
    first, second = sgd(model.parameters(), lr=0.1), sgd(model.parameters(), lr=0.1)
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, optimizer=first)
    controller.follow(second)
    assert (hooks(first), hooks(second)) == ([0, 0, 0], [1, 1, 1])
    step(model, first)
    assert controller.step_count == 0
    step(model, second)
    assert controller.step_count == 1
    assert "feather_param" not in first.state_dict()


@pytest.mark.parametrize("warned", [True, False])
def test_hooks_do_not_pile_up_over_rounds(warned):
    model = net()
    optimizer = sgd(model.parameters(), lr=0.1)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    for round_ in range(3):
        controller = feather_param.sparsify(model, final_rate=0.5, total_steps=2, optimizer=optimizer)
        step(model, optimizer)
        assert controller.step_count == 1
        feather_param.desparsify(model)
        if warned:
            with pytest.warns(UserWarning, match="stepped a model that was desparsified"):
                step(model, optimizer)
        assert hooks(optimizer) == [2, 1, 1]
        assert len(calls) == (round_ + 1) * (1 + warned)


def test_a_copied_controller_follows_nothing():
    model = net()
    optimizer = sgd(model.parameters(), lr=0.1, momentum=0.9)
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, end_step=3, optimizer=optimizer)
    step(model, optimizer)
    twins = [copy.deepcopy((model, controller, optimizer)) for _ in range(2)]
    model_by_hand, by_hand, optimizer_by_hand = twins[0]
    model_followed, followed, optimizer_followed = twins[1]
    followed.follow(optimizer_followed)
    for _ in range(2):
        step(model, optimizer)
        step(model_by_hand, optimizer_by_hand)
        by_hand.step()
        step(model_followed, optimizer_followed)
    assert controller.step_count == by_hand.step_count == followed.step_count == 3
    assert controller.threshold == by_hand.threshold == followed.threshold
    with pytest.raises(RuntimeError, match=r"expected step\(\) not to be called"):
        followed.step()
    by_hand.desparsify()
    step(model, optimizer)
    assert controller.step_count == 4
    assert by_hand.step_count == 3


REFUSED = [
    (lambda model: "sgd", TypeError, "expected optimizer to be a torch.optim.Optimizer, got str"),
    (
        lambda model: sgd(net().parameters(), lr=0.1),
        ValueError,
        r"expected an optimizer of this model's weights, got one that holds none .*parameters\(\), after fully_shard",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED)
def test_what_cannot_be_followed(make, error, message):
    model = net()
    mine = sgd(model.parameters(), lr=0.1)
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, optimizer=mine)
    with pytest.raises(error, match=message):
        controller.follow(make(model))
    step(model, mine)  # as before
    assert controller.step_count == 1


def test_following_after_desparsify():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, end_step=0)
    feather_param.desparsify(model)
    with pytest.raises(RuntimeError, match=r"expected follow\(\) before desparsify"):
        controller.follow(sgd(model.parameters(), lr=0.1))
    model = net()
    controller = feather_param.sparsify(
        model, final_rate=0.5, total_steps=4, end_step=0, optimizer=sgd(model.parameters(), lr=0.1)
    )
    feather_param.desparsify(model)
    with pytest.raises(RuntimeError, match=r"expected step\(\) before desparsify"):
        controller.step()


def test_an_optimizer_of_some_of_the_weights_is_told_of_once():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4)
    with pytest.warns(UserWarning, match=r"does not train 0.weight, 3.weight, which will be pruned") as caught:
        controller.follow(sgd(model[4].parameters(), lr=0.1))
    assert [warning.filename for warning in caught] == [__file__]


@pytest.fixture
def one_process():
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
        pytest.skip("FSDP2 of torch 2.6 does not run on a CPU")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()
    dist.destroy_process_group()


def test_an_optimizer_of_shards(one_process):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def build():
        model = net()
        controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4)
        too_early = torch.optim.Adam(model.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"got one that holds none of them: .* after fully_shard"):
            controller.follow(too_early)
        optimizer = torch.optim.Adam(model.parameters())
        controller.follow(optimizer)
        return model, controller, optimizer

    model, controller, optimizer = build()
    for _ in range(2):
        step(model, optimizer)
    assert controller.step_count == 2
    assert controller.report().zeros == 1164
    names = optimizer.state_dict()["feather_param"][0][0]
    assert names[:2] == ["0.bias", "0.weight"]
    other, follower, same_kind = build()
    set_optimizer_state_dict(other, same_kind, get_optimizer_state_dict(model, optimizer))
    follower.load_state_dict(controller.state_dict())
    assert follower.step_count == 2
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert same_kind.state[mine]["exp_avg"].shape == mine.shape
        assert torch.equal(
            same_kind.state[mine]["exp_avg"].full_tensor(), optimizer.state[theirs]["exp_avg"].full_tensor()
        )


class Clipping(torch.optim.Adam):
    """One whose step calls that of its base class."""

    fails = False

    def step(self, closure=None):
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1.0)
        loss = super().step(closure)
        if self.fails:
            raise FloatingPointError("overflow")
        return loss


def test_a_step_keeps_nothing_of_the_caller_alive():
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    feather_param.sparsify(model, final_rate=0.5, total_steps=2, optimizer=optimizer)
    activations = torch.ones(3)
    seen = weakref.ref(activations)
    optimizer.step()
    del activations
    assert seen() is None


@pytest.mark.parametrize("plain_first", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_that_calls_its_base_class_counts_once(plain_first, compiled):
    if plain_first:
        torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # torch then patches the step of Adam, too
    torch.compiler.reset()
    model = nn.Linear(8, 8)
    optimizer = Clipping(model.parameters(), lr=0.01)
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=9, optimizer=optimizer)
    make_step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    for at in range(1, 5):
        model(torch.ones(2, 8)).sum().backward()
        make_step()
        assert controller.step_count == at


def test_a_step_that_fails_does_not_count_and_the_next_one_does():
    model = nn.Linear(8, 8)
    optimizer = Clipping(model.parameters(), lr=0.01)
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=9, optimizer=optimizer)
    for fails, count in ((True, 0), (True, 0), (False, 1), (True, 1), (False, 2)):
        optimizer.fails = fails
        model(torch.ones(2, 8)).sum().backward()
        try:
            optimizer.step()
        except FloatingPointError:
            assert fails
        assert controller.step_count == count


@pytest.mark.parametrize("followed", [True, False])
@pytest.mark.parametrize("whole", [True, False], ids=["whole step", "optimizer.step"])
def test_steps_in_compiled_code(followed, whole):
    counts = []
    for compiled in (False, True):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = nn.Linear(16, 16)
        optimizer = sgd(model.parameters(), lr=0.1)
        controller = feather_param.sparsify(
            model, final_rate=0.9, total_steps=6, optimizer=optimizer if followed else None
        )

        def one(x, model=model, optimizer=optimizer, controller=controller):
            if whole:
                model(x).square().sum().backward()
            optimizer.step()
            if not followed:
                controller.step()

        call = torch.compile(one, backend="eager") if compiled else one
        for at in range(6):
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(at))
            if not whole:
                model(x).square().sum().backward()
            call(x)
            optimizer.zero_grad()
        counts.append((controller.step_count, int((model.weight == 0).sum()), controller.report().zeros))
    assert counts == [(6, 230, 230)] * 2


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: it has another's parameters, but no hooks."""

    def __init__(self, optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Lookahead(Wrapper):
    def __init__(self, optimizer) -> None:
        super().__init__(optimizer)
        self.slow, self.steps = [p.detach().clone() for p in self.param_groups[0]["params"]], 0

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        self.steps += 1
        if self.steps % 2 == 0:
            for slow, parameter in zip(self.slow, self.param_groups[0]["params"], strict=True):
                parameter.copy_(slow.lerp_(parameter, 0.5))
        return loss


class NoOptimizer:
    """A trainer's own object around an optimizer."""

    def __init__(self, optimizer) -> None:
        self._optimizer = optimizer

    def step(self):
        self._optimizer.step()


def accelerated(optimizer):
    return pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(optimizer)


WRAPPERS = [Wrapper, Lookahead, NoOptimizer, lambda optimizer: Wrapper(Wrapper(optimizer)), accelerated]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["Wrapper", "Lookahead", "NoOptimizer", "twice", "accelerate"])
def test_an_optimizer_inside_a_wrapper_is_followed(wrap):
    model = net()
    optimizer = wrap(sgd(model.parameters(), lr=0.1))
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, end_step=2, optimizer=optimizer)
    for at in range(4):
        model(torch.randn(2, 3, 6, 6)).square().sum().backward()
        optimizer.step()
        assert controller.step_count == at + 1
    with torch.no_grad():
        seen = [model[i].weight.detach().clone() for i in (0, 3, 4)]
    feather_param.desparsify(model)
    assert sum(int((model[i].weight == 0).sum()) for i in (0, 3, 4)) == 1164
    assert all(torch.equal(a, model[i].weight) for a, i in zip(seen, (0, 3, 4), strict=True))


class TwoInside(torch.optim.Optimizer):
    def __init__(self, *optimizers) -> None:
        self.a, self.b = optimizers

    def step(self, closure=None): ...


class NoneInside(torch.optim.Optimizer):
    def __init__(self, optimizer) -> None:
        self.param_groups = optimizer.param_groups

    def step(self, closure=None): ...


@pytest.mark.parametrize("make", [NoneInside, lambda optimizer: TwoInside(optimizer, optimizer)])
def test_a_wrapper_that_hides_its_optimizer_is_refused_and_the_model_is_as_it_was(make):
    model = net()
    optimizer = make(sgd(model.parameters(), lr=0.1))
    with pytest.raises(
        TypeError, match=r"expected an optimizer whose step\(\) calls hooks, got .*pass the optimizer that"
    ):
        feather_param.sparsify(model, final_rate=0.5, total_steps=4, optimizer=optimizer)
    assert list(model.state_dict()) == list(net().state_dict())
    feather_param.sparsify(model, final_rate=0.5, total_steps=4)


def test_the_step_by_which_a_checkpoint_makes_a_state_does_not_count():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    first = Run(net, torch.optim.Adam, built_first=False).follow().trained()
    state = get_optimizer_state_dict(first.model, first.optimizer)
    second = Run(net, torch.optim.Adam, built_first=False).follow()
    second.model.load_state_dict(first.model.state_dict())
    set_optimizer_state_dict(second.model, second.optimizer, state)
    assert second.controller.step_count == first.controller.step_count == 2


def train_blindly(model, optimizer, controller, steps) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 6, 6)).square().mean().backward()
        optimizer.step()
        controller.step()


def test_an_optimizer_without_the_dense_weights_is_told_of():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=40)
    found = [m.weight for m in model.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    found += [m.bias for m in model.modules() if isinstance(getattr(m, "bias", None), nn.Parameter)]
    optimizer = sgd(found, lr=0.1)
    train_blindly(model, optimizer, controller, 10)
    with pytest.warns(
        UserWarning, match=r"none of the 3 prunable weights has changed in 10 steps: .*named_parameters\(\)"
    ):
        train_blindly(model, optimizer, controller, 1)
    train_blindly(model, optimizer, controller, 20)  # once is enough


@pytest.mark.parametrize("way", ["fused", ".data", "frozen weights", "one of them"])
def test_an_optimizer_that_moves_weights_its_own_way_is_no_such_one(way):
    model = net()
    if way == "frozen weights":
        for layer in (model[0], model[3], model[4]):
            layer.weight.requires_grad_(False)
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=40)
    parameters = list(model[4].parameters()) if way == "one of them" else list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.01, fused=way == "fused")
    if way == ".data":
        optimizer = sgd(parameters, lr=0.0)
        optimizer.register_step_post_hook(lambda *_: [p.data.sub_(p.grad, alpha=0.1) for p in parameters])
    train_blindly(model, optimizer, controller, 25)

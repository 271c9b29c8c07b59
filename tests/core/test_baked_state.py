"""A saved state is baked without its model, and equals the baked state of the model bit for bit."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import feather_param
from feather_param import allocations, patterns
from tests.core.models import Doubled, sparsify_at_once
from tests.core.saved_states import ENTRY, linear, require_same, tied, two_groups, used_twice
from tests.network import net

PATTERNS = [patterns.elements, patterns.n_m(2, 4), patterns.blocks(1, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def erk(weights, zeros, guards):
    """Prune each weight by the same fraction, under the name of another allocation."""
    return allocations.uniform(weights, zeros, guards)


ALLOCATIONS = {
    **{name: getattr(allocations, name) for name in ("global_magnitude", "uniform", "erk", "square_root")},
    **{name: getattr(allocations, name) for name in ("lamp", "normalised")},
    "per_layer": allocations.per_layer({"0": 0.5, "*": 0.9}),
    "in_proportion": allocations.in_proportion(lambda name, weight: weight.shape[0]),
    "from_plan": allocations.from_plan({"0.weight": 300, "2.weight": 200, "3.weight": 60}),
    "two groups": two_groups,
    "one with the name of another": erk,
}


def train(model: nn.Module, controller: feather_param.Controller, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        dtype = next(model.parameters()).dtype
        optimizer.zero_grad()
        model(torch.randn(8, 24, dtype=dtype)).square().mean().backward()
        optimizer.step()
        controller.step()


GUARDS = {"max_rate_per_layer": 0.48, "min_nonzero_per_layer": 66}
WITH_GUARDS = ("global_magnitude", "uniform", "lamp", "normalised", "in_proportion")


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(
    ("allocation", "guards"), [*((name, {}) for name in ALLOCATIONS), *((name, GUARDS) for name in WITH_GUARDS)]
)
def test_each_allocation_and_pattern_at_each_point_of_a_training(allocation, guards, pattern):
    model = linear()
    settings = {"allocation": ALLOCATIONS[allocation], "pattern": pattern, **guards}
    controller = feather_param.sparsify(model, final_rate=0.45, total_steps=6, end_step=2, **settings)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.7))
    require_same(model)  # before the first step
    for _ in range(2):  # before the full rate, and at it
        train(model, controller, 1)
        average.update_parameters(model)
        for each in (model, average, copy.deepcopy(model)):
            require_same(each)
    with torch.no_grad():  # the state is saved before the thresholds are computed again
        model[0].parametrizations.weight.original.mul_(torch.rand(24, 24))
    require_same(model)
    controller.freeze()
    train(model, controller, 1)
    require_same(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_exponent_dtype_and_pattern_with_ties_and_zeros(dtype):
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.25, 6e-8, -1e-7, 0.5])
    exponents = [0.5, 1, 2, 3.0, 5.5, math.inf]
    for p, pattern, zeros in itertools.product(exponents, PATTERNS, [0, 300]):
        model = linear(dtype)
        with torch.no_grad():
            for layer in (model[0], model[2], model[3]):
                layer.weight.copy_(values[torch.randint(2 if zeros == 0 else 8, layer.weight.shape)])
            if not zeros:
                model[0].weight.normal_()
        allocation = two_groups if p == 2 else allocations.global_magnitude
        sparsify_at_once(model, 0.4, p=p, pattern=pattern, theta=0.3, allocation=allocation)
        require_same(model)


class WithAttributeNamedAsWrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._orig_mod, self.head = nn.ModuleDict({"head": nn.Linear(8, 4)}), nn.Linear(8, 4)


LAYERS: dict[str, tuple[Callable[[], nn.Module], dict]] = {
    "convolutions": (net, {}),
    "channels last": (lambda: net().to(memory_format=torch.channels_last), {}),
    "one layer": (lambda: nn.Linear(8, 8), {}),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.Conv1d(4, 4, 3)), {}),
    "attention": (lambda: nn.TransformerEncoderLayer(16, 2, 16), {}),
    "attention with three inputs": (lambda: nn.MultiheadAttention(16, 2, kdim=8, vdim=4), {}),
    "recurrent": (lambda: nn.LSTM(6, 8, num_layers=2), {"include": "weight_*"}),
    "embedding and a head": (
        lambda: nn.ModuleDict({"e": nn.Embedding(9, 8), "h": nn.Linear(8, 9)}),
        {"include": "*.weight"},
    ),
    "tied": (tied, {}),
    "a module used twice": (used_twice, {}),
    "names of wrappers": (WithAttributeNamedAsWrapper, {}),
}


@pytest.mark.parametrize(("build", "settings"), LAYERS.values(), ids=LAYERS)
def test_each_kind_of_layer(build, settings):
    torch.manual_seed(0)
    model = build()
    sparsify_at_once(model, 0.6, **settings)
    in_order = "recurrent" not in settings and not settings
    found = require_same(model, in_order=in_order)
    plain = build()
    plain.load_state_dict(found)
    if build in (tied, used_twice):
        one, other = ("a", "b") if build is tied else ("first", "again")
        assert found[f"{one}.weight"] is found[f"{other}.weight"]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "AveragedModel": AveragedModel,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "a parent": lambda model: nn.Sequential(nn.Identity(), model),
    "a compiled layer": lambda model: model.append(torch.compile(model.pop(4), backend="eager")),
    "DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_states_of_wrapped_models(wrap):
    model = net()
    sparsify_at_once(model, 0.75)
    require_same(wrap(model))


@pytest.mark.parametrize("own", [False, True], ids=["", "own allocation"])
def test_the_state_of_a_submodule_that_holds_all_pruned_weights(own):
    model = nn.ModuleDict({"net": nn.Sequential(linear()), "norm": nn.BatchNorm1d(8)})
    sparsify_at_once(model, 0.75, **({"allocation": two_groups} if own else {}))
    for part in (model["net"], model["net"][0], nn.Sequential(nn.Identity(), model["net"])):
        require_same(part)


def test_parts_that_were_sparsified_separately_and_their_copies():
    model = nn.ModuleDict({"a": linear(seed=1), "b": linear(seed=2), "dense": nn.Linear(4, 4)})
    sparsify_at_once(model["a"], 0.5, p=1.0)
    sparsify_at_once(model["b"], 0.8, allocation=allocations.erk)
    model["a_before"] = copy.deepcopy(model["a"])
    model["b"][0].parametrizations.weight.original.data.mul_(3.0)
    require_same(model)


def test_a_dense_layer_with_weight_norm_keeps_its_entries():
    model = net()
    torch_parametrizations.weight_norm(model[4])
    parametrize.register_parametrization(model[3], "bias", Doubled())
    sparsify_at_once(model, 0.75, exclude="4.*")
    require_same(model, in_order=False)


def test_a_bake_before_the_full_rate_warns_unless_it_is_frozen():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=6, end_step=4)
    controller.step()
    with pytest.warns(UserWarning, match=r"expected the bake of a state after the 2,095 zeros of final_rate .* 1,211"):
        feather_param.baked_state_dict(model.state_dict())
    controller.freeze()
    feather_param.baked_state_dict(model.state_dict())


def test_a_state_is_not_changed():
    model = net()
    sparsify_at_once(model)
    state = copy.deepcopy(model.state_dict())
    feather_param.baked_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_entry_has_the_same_size_at_each_step_and_survives_an_average_with_itself():
    model = linear()
    allocation = allocations.per_layer({"*": 1 / 3})
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=20, allocation=allocation)
    first = model.state_dict()[ENTRY]
    train(model, controller, 11)
    last = model.state_dict()[ENTRY]
    assert first.shape == last.shape
    assert first.dtype == last.dtype == torch.int64
    assert torch.equal(((last.double() + last.double()) / 2).to(torch.int64), last)

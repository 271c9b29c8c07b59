"""Patterns: units against slow twins, exact numbers of zeros, and everything that a model does with them."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import feather_param
from feather_param import patterns
from feather_param.inference import is_semi_structured, semi_structured, to_semi_structured
from tests.inference.test_semi_structured import on_cpu, to_dense
from tests.pattern_twins import TWINS, prune, used
from tests.training import same_state

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OTHERS = [name for name in TWINS if name != "elements"]
VALUES = torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0, 1.5, -2.0])

# Layers whose weights all patterns of the twins divide: 24 is a multiple of 3, 4 and 8.
LAYERS = {
    "Linear": lambda: nn.Linear(24, 12),
    "Conv1d": lambda: nn.Conv1d(24, 4, 2),
    "Conv2d": lambda: nn.Conv2d(24, 4, (1, 2)),
    "Conv2d in channels-last format": lambda: nn.Conv2d(24, 4, 2).to(memory_format=torch.channels_last),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 24, 1),
    "MultiheadAttention": lambda: nn.MultiheadAttention(24, 2),
}


def fill(model: nn.Module, seed: int, ties: bool) -> None:
    """Write random values into the weights: normally distributed ones, or few different ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            index = torch.randint(len(VALUES), parameter.shape, generator=generator)
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(VALUES[index] if ties else values)


def quietly(call, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing survives")
        return call(*args, **kwargs)


def at_once(model: nn.Module, pattern, final_rate: float = 0.5, **arguments) -> feather_param.Controller:
    """Sparsify a model with the final rate from the start."""
    arguments = {"total_steps": 1, "end_step": 0, **arguments}
    return quietly(feather_param.sparsify, model, final_rate=final_rate, pattern=pattern, **arguments)


def dense(model: nn.Module) -> dict[str, Tensor]:
    """Return the dense weights of a sparsified model by name."""
    names = {name: parameter for name, parameter in model.named_parameters() if name.endswith(".original")}
    return {name.replace("parametrizations.", "").removesuffix(".original"): w.detach() for name, w in names.items()}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def loss(model: nn.Module, step: int) -> Tensor:
    return model(torch.randn(8, 16, generator=torch.Generator().manual_seed(step))).square().mean()


def train(model, controller, optimizer, steps) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        value = loss(model, step)
        value.backward()
        optimizer.step()
        quietly(controller.step)
        losses.append(value.item())
    return losses


# -- against the twins ------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(
    name=st.sampled_from(sorted(TWINS)),
    kind=st.sampled_from(sorted(LAYERS)),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([1.0, 2.0, 2.5, 3.0, math.inf]),
    theta=st.sampled_from([1.0, 0.5, lambda rate: 0.25]),
    fraction=st.sampled_from([0.05, 0.3, 0.7, 1.0]),
    ties=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_weight_is_pruned_computed_and_baked_as_the_twin_does(name, kind, dtype, p, theta, fraction, ties, seed):
    pattern, twin = TWINS[name]
    model = LAYERS[kind]().to(dtype)
    fill(model, seed, ties)
    rate = fraction * min(0.9, pattern.largest_rate)
    assume(round(rate * sum(weight.numel() for weight in model.parameters() if weight.dim() > 1)) >= pattern.size)
    controller = at_once(model, pattern, rate, p=p, theta=theta)
    found = controller.masks()  # in the library's order, which decides between equal magnitudes
    weights = {name: dense(model)[name] for name in found}
    total = sum(weight.numel() for weight in weights.values())
    zeros = round(rate * total) // pattern.size * pattern.size
    threshold, masks = prune(weights, zeros, twin)
    report = quietly(controller.report)
    formats = {key: value.stride() for key, value in weights.items()}
    for row in report.rows:
        weight, mask = weights[row.name], masks[row.name]
        layer, _, tensor = row.name.rpartition(".")
        value = getattr(model.get_submodule(layer), tensor)
        assert torch.equal(found[row.name], mask)
        expected, pruned = used(weight, threshold, p, pattern, twin)
        assert torch.equal(value == 0, (expected == 0))
        eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
        tiny = torch.finfo(torch.float16).tiny if dtype == torch.float16 else 0.0
        assert ((value.double() - expected).abs() <= 16 * eps * expected.abs() + tiny * eps).all()
        assert value.stride() == formats[row.name]
        (grad,) = torch.autograd.grad(value.sum(), model.get_submodule(layer).parametrizations[tensor].original)
        scale = theta if isinstance(theta, float) else 0.25
        assert torch.equal(grad, torch.where(pruned, scale, 1.0).to(dtype))
        assert row.zeros == int((~mask).sum())
        assert row.survivors == int((expected != 0).sum())
    quietly(feather_param.desparsify, model)
    for row in report.rows:
        assert torch.equal(model.get_parameter(row.name) != 0, masks[row.name])
    natural = sum(int((weight == 0).sum()) for weight in weights.values())
    assert report.zeros == zeros or (threshold == 0 and report.zeros == natural)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 4)])
@pytest.mark.parametrize("constant", [False, True], ids=["random", "constant"])
def test_at_the_largest_rate_each_group_has_exactly_n_non_zeros(n, m, dtype, constant):
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 24), nn.Conv2d(16, 2, 3)).to(dtype)
    if constant:
        for layer in model:
            nn.init.constant_(layer.weight, -0.5)
    at_once(model, patterns.n_m(n, m), 1 - n / m)
    quietly(feather_param.desparsify, model)
    for layer in model:
        groups = layer.weight.transpose(1, -1).reshape(-1, m)
        assert ((groups != 0).sum(1) == n).all()


def test_zeros_of_kept_units_become_negligible_so_that_the_number_of_zeros_is_exact():
    layer = nn.Linear(4, 2, bias=False)
    layer.weight = nn.Parameter(torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.1, 0.2, 0.1, 0.2]]))
    at_once(layer, patterns.blocks(1, 4))
    feather_param.desparsify(layer)
    assert layer.weight[0].eq(0).tolist() == [False, False, False, False]
    assert layer.weight[1].eq(0).all()
    assert layer.weight[0, :3].abs().max() < 1e-37


def test_a_weight_with_zeros_is_unchanged_before_the_pruning_begins():
    model = net()
    fill(model, 0, ties=True)
    before = copy.deepcopy(model.state_dict())
    feather_param.sparsify(model, final_rate=0.5, total_steps=4, pattern=patterns.blocks(1, 4))
    with pytest.warns(UserWarning, match="expected desparsify"):
        feather_param.desparsify(model)
    assert same_state(model.state_dict(), before)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1e-30), (torch.float32, 1e30), (torch.float64, 1e-300), (torch.float64, 1e300)],
)
def test_magnitudes_of_blocks_neither_underflow_nor_overflow(dtype, scale):
    layer = nn.Linear(8, 8, dtype=dtype)
    with torch.no_grad():
        layer.weight.mul_(scale)
    weight = layer.weight.detach().clone()
    at_once(layer, patterns.blocks(1, 4), 0.5)
    ratio = layer.weight.detach() / weight
    assert (ratio == 0).sum() == 32
    assert ((ratio >= 0) & (ratio < 1)).all()


# -- 2:4 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_converter_of_2_4_weights_takes_a_model_pruned_2_4(dtype, monkeypatch):
    monkeypatch.setattr(semi_structured, "_refuse_device", lambda name, device: None)
    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", on_cpu)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).to(dtype)
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, pattern=patterns.n_m(2, 4))
    for _ in range(4):
        controller.step()
    feather_param.desparsify(model)
    assert is_semi_structured(model)
    weights = [model[i].weight.detach().clone() for i in (0, 2)]
    assert to_semi_structured(model) == ["0", "2"]
    for i, weight in zip((0, 2), weights, strict=True):
        assert torch.equal(to_dense(model[i].weight), weight)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_all_weights_that_do_not_fit_are_named_with_the_exclude_that_leaves_them_dense():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    with pytest.raises(ValueError, match=r"2.weight \(8 x 9\)") as error:
        feather_param.sparsify(model, final_rate=0.5, total_steps=1, pattern=patterns.blocks(1, 4))
    assert "0.weight (8 x 27)" in str(error.value)
    assert "1.weight (8 x 72)" not in str(error.value)
    exclude = ["0.weight", "2.weight"]
    assert f"exclude={exclude}" in str(error.value)
    with pytest.raises(ValueError, match=r"n_m\(2, 4\).*0.weight \(3 inputs\), 2.weight \(1 inputs\)"):
        feather_param.plan(model, final_rate=0.5, pattern=patterns.n_m(2, 4))
    feather_param.sparsify(model, final_rate=0.5, total_steps=1, pattern=patterns.blocks(1, 4), exclude=exclude)


def test_a_rate_above_that_of_the_pattern_is_refused_with_the_largest_one():
    model = net()
    with pytest.raises(
        ValueError, match=r"at most 0.5, the limit set by the pattern \(384 of 768 .*got 0.51; lower it"
    ):
        feather_param.sparsify(model, final_rate=0.51, total_steps=1, pattern=patterns.n_m(2, 4))
    with pytest.raises(ValueError, match=r"the limit set by the pattern, max_rate_per_layer and"):
        feather_param.sparsify(model, final_rate=0.5, total_steps=1, pattern=patterns.n_m(2, 4), max_rate_per_layer=0.4)
    assert not hasattr(model[0], "parametrizations")


@pytest.mark.parametrize("pattern", ["n_m(2, 4)", patterns.n_m, (2, 4), 4])
def test_another_type_is_refused_as_a_pattern(pattern):
    with pytest.raises(
        TypeError, match=r"expected pattern to be None or a call of a function of feather_param.patterns"
    ):
        feather_param.sparsify(net(), final_rate=0.5, total_steps=1, pattern=pattern)


def test_the_sizes_of_a_pattern_are_checked():
    with pytest.raises(ValueError, match=r"expected n < m, got n_m\(4, 4\), which prunes nothing"):
        patterns.n_m(4, 4)
    with pytest.raises(ValueError, match="expected n to be at least 1, got 0"):
        patterns.n_m(0, 4)
    with pytest.raises(ValueError, match="expected columns to be at least 1, got 0"):
        patterns.blocks(1, 0)
    with pytest.raises(TypeError, match=r"expected rows to be an int, got 1\.0"):
        patterns.blocks(1.0, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused_at_the_next_step(name, value):
    model = nn.Sequential(nn.Linear(24, 12), nn.Linear(24, 12))
    controller = feather_param.sparsify(model, final_rate=0.3, total_steps=4, pattern=TWINS[name][0])
    with torch.no_grad():
        model[1].parametrizations.weight.original[5, 7] = value
    with pytest.raises(ValueError, match=r"expected finite weights, got NaN or infinity in 1.weight"):
        controller.step()
    assert controller.step_count == 0


def test_a_state_with_more_zeros_than_the_pattern_allows_is_refused():
    state = at_once(saved := net(), None, 0.9) and saved.state_dict()
    model = net()
    at_once(model, patterns.n_m(2, 4))
    model.load_state_dict(state)
    with pytest.raises(ValueError, match=r"expected at most 384 zeros with n_m\(2, 4\), got 691; give sparsify"):
        loss(model, 0)

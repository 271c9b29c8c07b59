"""The exact number of zeros after a bake, for each dtype, with ties, and with guards."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import feather_param
from archs import densenet, mobilenet_v1, resnet20
from tests import twins
from tests.core.models import sparsify_at_once
from tests.network import net
from tests.training import zeros_in

RATES = [0.5, 0.9, 0.95, 0.98, 0.99, 0.995]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", [resnet20, mobilenet_v1, densenet], ids=lambda arch: arch.__name__)
def test_each_network_has_the_exact_number_of_zeros_at_each_rate(arch, dtype):
    model = arch().to(dtype)
    total = sum(weight.numel() for weight in twins.prunable(model))
    plain = model.state_dict()
    for rate in RATES:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "nothing survives")  # expected at 99.5 % of random weights
            sparsify_at_once(model, rate)
            layers = [module for module in model.modules() if parametrize.is_parametrized(module)]
            evaluated = [layer.weight.detach().clone() for layer in layers]
            feather_param.desparsify(model)
        assert zeros_in(model) == round(rate * total)
        assert list(model.state_dict()) == list(plain)
        # The baked weights are the evaluated ones. Only kept ties differ: they become the dtype's smallest number.
        for before, after in zip(evaluated, twins.prunable(model), strict=True):
            assert (before - after).abs().max() <= torch.finfo(dtype).smallest_normal
        with torch.no_grad():  # other weights for the next rate
            for weight in twins.prunable(model):
                weight.normal_(std=0.05)


@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.25, 6e-8, -1e-7]), min_size=2, max_size=30),
    rate=st.floats(0.01, 0.99),
    p=st.sampled_from([1.0, 2.0, 3.0, 5.5, float("inf")]),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=300)
@pytest.mark.filterwarnings("ignore:nothing survives")
def test_ties_and_zeros_among_the_weights_leave_the_number_of_zeros_exact(values, rate, p, dtype):
    size = len(values)
    zeros = round(rate * size)
    if zeros == size:
        return
    layer = nn.Linear(size, 1, bias=False).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([values]))
    dense = layer.weight.detach().clone()
    sparsify_at_once(layer, rate, p=p)
    evaluated = layer.weight.detach().clone()
    feather_param.desparsify(layer)
    assert (layer.weight == 0).flatten().tolist() == twins.zeros([dense], zeros)
    kept = layer.weight != 0
    assert (layer.weight.sign() == dense.sign())[kept].all()
    assert (layer.weight - evaluated).abs().max() <= torch.finfo(dtype).smallest_normal


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_ties_are_broken_by_position_in_each_memory_format(layout):
    conv = nn.Conv2d(4, 4, 3, bias=False)
    with torch.no_grad():
        conv.weight.fill_(1.0)
    if layout == "channels_last":
        conv.to(memory_format=torch.channels_last)
    sparsify_at_once(conv)
    with pytest.warns(UserWarning, match="all kept elements of weight equal the threshold"):
        feather_param.desparsify(conv)
    assert (conv.weight.flatten()[:72] == 0).all()
    assert (conv.weight.flatten()[72:] != 0).all()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("call", ["desparsify", "freeze", "baked_state_dict"])
def test_float64_weights_that_are_equal_in_float32_have_the_exact_number_of_zeros(seed, call):
    torch.manual_seed(seed)
    layer = nn.Linear(40, 30, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(1.0 + 1e-9 * torch.rand_like(layer.weight))  # between the numbers of float32
    controller = sparsify_at_once(layer, 0.9)
    evaluated = layer.weight.detach().clone()
    state = feather_param.baked_state_dict(layer)
    if call == "freeze":
        controller.freeze()
    if call != "baked_state_dict":
        feather_param.desparsify(layer)
        state = layer.state_dict()
    assert int((state["weight"] == 0).sum()) == 1080
    assert (state["weight"] - evaluated).abs().max() <= torch.finfo(torch.float64).smallest_normal


def test_float64_weights_beyond_the_range_of_float32_are_pruned():
    layer = nn.Linear(4, 4, bias=False, dtype=torch.float64)
    for scale in (1e-300, 1e300):
        with torch.no_grad():
            layer.weight.copy_(torch.arange(1, 17, dtype=torch.float64).view(4, 4) * scale)
        dense = layer.weight.detach().clone()
        controller = sparsify_at_once(layer)
        assert controller.threshold.dtype == torch.float64
        assert controller.report().zeros == 8 == int((layer.weight == 0).sum())
        feather_param.desparsify(layer)
        assert torch.equal(layer.weight != 0, dense > 8 * scale)
    with torch.no_grad():
        layer.weight.fill_(1e-310)
    dense = layer.weight.detach().clone()
    feather_param.sparsify(layer, final_rate=0.5, total_steps=4)
    assert torch.equal(layer.weight, dense)  # with a threshold of zero the operator is the identity


def test_weights_of_several_dtypes_are_pruned_by_one_threshold():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(20, 20, bias=False, dtype=d) for d in (torch.float64, torch.float32, torch.half)))
    controller = sparsify_at_once(model, 0.7)
    assert zeros_in(model) == controller.report().zeros == 840
    feather_param.desparsify(model)
    assert zeros_in(model) == 840


def test_a_weight_with_more_zeros_than_the_rate_asks_for_keeps_them():
    layer = nn.Linear(10, 1, bias=False)
    with torch.no_grad():
        layer.weight[0, :6] = 0
    sparsify_at_once(layer)
    feather_param.desparsify(layer)
    assert twins.count_zeros([layer.weight]) == 6


WRAPPERS = {
    "AveragedModel": lambda model: AveragedModel(model),
    "a parent": lambda model: nn.Sequential(nn.Identity(), model),
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("call", ["desparsify", "baked_state_dict"])
def test_guards_hold_when_a_model_is_baked_inside_a_wrapper(wrap, call):
    model = net()
    with torch.no_grad():
        model[4].weight.mul_(0.01)
    controller = sparsify_at_once(model, max_rate_per_layer=0.6)
    zeros = [row.zeros for row in controller.report().rows]
    wrapped = wrap(model)
    state = feather_param.baked_state_dict(wrapped)
    if call == "desparsify":
        feather_param.desparsify(wrapped)
        state = wrapped.state_dict()
    found = [int((v == 0).sum()) for key, v in state.items() if key.endswith("weight") and v.dim() > 1]
    assert found == zeros

"""A sparse layer computes the output of the dense one, and refuses other inputs."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from feather_param.inference import kernel
from feather_param.inference import layers as sparse_layers
from feather_param.inference.layers import SparseLayer
from tests.inference.pruned import METHODS, pruned


def sparse_layer(layer, method):
    sparse = SparseLayer(layer)
    sparse.method = method
    return sparse


def assert_computes_the_same(sparse, layer, x):
    """Compare with float64. A sum of n products and a bias, in any order, has at most n + 1 roundings of each term."""
    twin, size = copy.deepcopy(layer).double(), copy.deepcopy(layer).double()
    for parameter in size.parameters():
        parameter.data.abs_()
    with torch.no_grad():
        expected = twin(x.double())
        terms = size(x.double().abs())  # exact: padding modes only move elements
        got = sparse(x)
    n = int(layer.weight.count_nonzero(dim=tuple(range(1, layer.weight.dim()))).max())
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    assert got.is_contiguous()
    assert ((got - expected).abs() <= (n + 1) * torch.finfo(torch.float32).eps * terms).all()


LAYERS = {
    "linear": (nn.Linear(20, 7), (3, 20)),
    "linear, one vector": (nn.Linear(20, 7), (20,)),
    "linear, batch 1": (nn.Linear(20, 7), (1, 20)),
    "linear, batch 0": (nn.Linear(20, 7), (0, 20)),
    "linear, no bias": (nn.Linear(20, 7, bias=False), (40, 20)),
    "linear, leading dimensions": (nn.Linear(20, 7), (2, 3, 5, 20)),
    "linear, more columns than a block": (nn.Linear(20, 7), (1100, 20)),
    "conv1d": (nn.Conv1d(6, 8, 3), (2, 6, 11)),
    "conv1d, causal dilation": (nn.Conv1d(6, 8, 3, padding=8, dilation=4), (2, 6, 11)),
    "conv2d": (nn.Conv2d(6, 8, 3), (2, 6, 9, 7)),
    "conv2d, 1x1": (nn.Conv2d(6, 8, 1), (1, 6, 9, 7)),
    "conv2d, 1x1, batch": (nn.Conv2d(6, 8, 1, bias=False), (3, 6, 9, 7)),
    "conv2d, 1x1, stride 2": (nn.Conv2d(6, 8, 1, stride=2), (2, 6, 9, 7)),
    "conv2d, 1x1, padding": (nn.Conv2d(6, 8, 1, padding=2), (1, 6, 9, 7)),
    "conv2d, ResNet's first": (nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), (1, 3, 40, 42)),
    "conv2d, stride beyond the window": (nn.Conv2d(6, 8, 2, stride=3, padding=1), (2, 6, 9, 7)),
    "conv2d, unequal in both directions": (nn.Conv2d(6, 8, (3, 2), (1, 2), (2, 0), (2, 1)), (2, 6, 9, 7)),
    "conv2d, padding larger than the image": (nn.Conv2d(6, 8, 3, padding=5), (1, 6, 2, 1)),
    "conv2d, same": (nn.Conv2d(6, 8, 4, padding="same", dilation=2), (2, 6, 9, 7)),
    "conv2d, groups": (nn.Conv2d(6, 8, 3, padding=1, groups=2), (2, 6, 9, 7)),
    "conv2d, depthwise": (nn.Conv2d(6, 12, 3, padding=1, stride=2, groups=6), (2, 6, 9, 7)),
    "conv2d, reflect": (nn.Conv2d(6, 8, 3, padding=2, padding_mode="reflect"), (2, 6, 9, 7)),
    "conv2d, replicate": (nn.Conv2d(6, 8, 3, padding=1, stride=2, padding_mode="replicate"), (2, 6, 9, 7)),
    "conv2d, circular": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 9, 7)),
    "conv2d, no batch": (nn.Conv2d(6, 8, 3, padding=1), (6, 9, 7)),
    "conv2d, batch 0": (nn.Conv2d(6, 8, 3, padding=1), (0, 6, 9, 7)),
    "conv3d": (nn.Conv3d(4, 6, 3, padding=1, stride=(1, 2, 2)), (2, 4, 5, 6, 7)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_sparse_layer_computes_the_dense_output(name, method):
    layer, shape = LAYERS[name]
    sparse = sparse_layer(pruned(layer), method)
    assert_computes_the_same(sparse, layer, torch.randn(shape))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=100, derandomize=True)
@given(st.data())
def test_a_convolution_of_any_geometry_computes_the_dense_output(method, data):
    dims = data.draw(st.integers(1, 2))
    numbers = lambda low, high: data.draw(st.tuples(*[st.integers(low, high)] * dims))  # noqa: E731
    kernel, stride, padding, dilation = numbers(1, 4), numbers(1, 4), numbers(0, 4), numbers(1, 3)
    groups = data.draw(st.sampled_from([1, 2, 4]))
    smallest = (max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True))
    sizes = (low + more for low, more in zip(smallest, numbers(0, 6), strict=True))
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    layer = pruned(kind(4, 8, kernel, stride, padding, dilation, groups), rate=0.5)
    sparse = sparse_layer(layer, method)
    with mock.patch.object(sparse_layers, "_CHUNK", data.draw(st.sampled_from([1, 500, 10**6]))):  # chunks of a batch
        assert_computes_the_same(sparse, layer, torch.randn(data.draw(st.integers(1, 5)), 4, *sizes))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_weights_without_zeros_and_with_zeros_alone(method, rate):
    layer = pruned(nn.Conv2d(4, 5, 3), rate)
    sparse = sparse_layer(layer, method)
    assert_computes_the_same(sparse, layer, torch.randn(1, 4, 6, 6))


@pytest.mark.parametrize("method", METHODS)
def test_inputs_of_any_memory_format(method):
    layer = pruned(nn.Conv2d(4, 5, 3, stride=2, padding=1))
    sparse = sparse_layer(layer, method)
    x = torch.randn(2, 4, 12, 10)
    for view in (
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3),
        x[:, :, ::2, 1:],
        x[:1].expand(3, 4, 12, 10),
    ):
        assert_computes_the_same(sparse, layer, view)
    linear = pruned(nn.Linear(4, 5))
    sparse = sparse_layer(linear, method)
    assert_computes_the_same(sparse, linear, x.transpose(1, 3))


@pytest.mark.parametrize("method", METHODS)
def test_sizes_may_change_from_call_to_call(method):
    layer = pruned(nn.Conv2d(4, 5, 3, padding=1))
    sparse = sparse_layer(layer, method)
    for shape in ((1, 4, 8, 8), (2, 4, 8, 8), (1, 4, 5, 9), (1, 4, 8, 8)):
        assert_computes_the_same(sparse, layer, torch.randn(shape))


@pytest.mark.parametrize("method", METHODS)
def test_several_threads_may_call_it(method):
    layer = pruned(nn.Conv2d(4, 5, 3, padding=1))
    sparse = sparse_layer(layer, method)
    inputs = [torch.randn(1, 4, n, n) for n in range(4, 20)] * 10
    expected = [sparse(x) for x in inputs]
    with ThreadPoolExecutor(4) as threads:
        assert all(map(torch.equal, threads.map(sparse, inputs), expected))


@pytest.mark.parametrize("method", METHODS)
def test_infinite_inputs_reach_only_outputs_with_a_weight_for_them(method):
    layer = nn.Linear(3, 2)
    layer.weight.data = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    sparse = sparse_layer(layer, method)
    x = torch.tensor([[1.0, float("inf"), float("nan")]])
    assert torch.equal(sparse(x).isfinite(), torch.tensor([[True, False]]))


@pytest.mark.usefixtures("without_numba")
def test_without_numba_a_layer_uses_csr():
    assert kernel.compiled() is None
    layer = pruned(nn.Conv2d(4, 5, 3, padding=1))
    assert_computes_the_same(sparse_layer(layer, "kernel"), layer, torch.randn(1, 4, 6, 6))


WRONG_INPUTS = {
    "dtype": (torch.zeros(1, 4, 6, 6).double(), TypeError, r"got input of torch\.float64 on cpu; use the dense model"),
    "device": (torch.zeros(1, 4, 6, 6).to("meta"), TypeError, r"got input of torch\.float32 on meta"),
    "gradient": (torch.zeros(1, 4, 6, 6).requires_grad_(), RuntimeError, "expected an input without gradient"),
    "channels": (
        torch.zeros(1, 3, 6, 6),
        ValueError,
        r"expected 4 input channels, got a tensor of shape \(1, 3, 6, 6\)",
    ),
    "dimensions": (torch.zeros(1, 1, 4, 6, 6), ValueError, "expected 4 input channels"),
    "too few dimensions": (torch.zeros(4, 6), ValueError, "expected 4 input channels"),
    "small": (torch.zeros(1, 4, 2, 6), ValueError, r"at least the window's size \(3, 3\), got \(2, 6\)"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_inputs_that_are_refused(name, method):
    x, error, message = WRONG_INPUTS[name]
    sparse = sparse_layer(pruned(nn.Conv2d(4, 5, 3)), method)
    with pytest.raises(error, match=message):
        sparse(x)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_cast_to_another_dtype_is_refused(method):
    sparse = sparse_layer(pruned(nn.Linear(6, 6)), method)
    x = torch.randn(2, 6)
    before = sparse(x)
    with pytest.raises(TypeError, match=r"got weight of torch\.float16 on cpu"):
        sparse.half()(x)
    assert not torch.equal(sparse.float()(x), before)  # it computes with the rounded weights
    assert torch.allclose(sparse(x), before, atol=1e-2)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # from torch.jit, depending on the version
def test_a_trace_is_refused():
    sparse = SparseLayer(pruned(nn.Linear(6, 6)))
    with pytest.raises(RuntimeError, match="expected a call that is not traced"):
        torch.jit.trace(sparse, torch.randn(2, 6))


def test_the_repr_shows_sizes_and_method():
    assert repr(SparseLayer(pruned(nn.Linear(6, 4), 1.0))) == "SparseLayer(6, 4, nonzeros=0, method='csr')"
    assert (
        repr(SparseLayer(pruned(nn.Conv1d(6, 4, 3), 1.0))) == "SparseLayer(6, 4, window=(3,), nonzeros=0, method='csr')"
    )

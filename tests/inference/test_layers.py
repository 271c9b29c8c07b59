"""A sparse layer computes the output of the dense one, and refuses other inputs."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from feather_param.inference.fusing.fuse import ACTIVATIONS, FusedLayer
from feather_param.inference.layers import SparseLayer
from tests.inference.layer_cases import LAYERS, drawn_convolution
from tests.inference.pruned import assert_computes_the_same, pruned

MORE_LAYERS = {
    "linear, one vector": (nn.Linear(20, 7), (20,)),
    "linear, leading dimensions": (nn.Linear(20, 7), (2, 3, 5, 20)),
    "conv2d, reflect": (nn.Conv2d(6, 8, 3, padding=2, padding_mode="reflect"), (2, 6, 9, 7)),
    "conv2d, replicate": (nn.Conv2d(6, 8, 3, padding=1, stride=2, padding_mode="replicate"), (2, 6, 9, 7)),
    "conv2d, circular": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 9, 7)),
    "conv2d, no batch": (nn.Conv2d(6, 8, 3, padding=1), (6, 9, 7)),
    "conv2d, reflect, no batch": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (6, 9, 7)),
}
ALL_LAYERS = {**LAYERS, **MORE_LAYERS}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", ALL_LAYERS)
def test_every_kind_of_layer(name):
    layer, shape = ALL_LAYERS[name]
    assert_computes_the_same(SparseLayer(pruned(layer)), layer, torch.randn(shape))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "name", ["linear", "linear, one token", "conv1d", "conv2d", "conv2d, reflect", "conv2d, no batch"]
)
def test_activations_and_residuals(name, activation):
    layer, shape = ALL_LAYERS[name]
    sparse, x = SparseLayer(FusedLayer(pruned(layer), activation)), torch.randn(shape)
    assert_computes_the_same(sparse, layer, x, None, activation)
    residual = torch.randn(layer(x).shape)
    before = residual.clone()
    for added in (residual, residual[:1], torch.randn(residual.shape[::-1]).permute(*reversed(range(residual.dim())))):
        assert_computes_the_same(sparse, layer, x, added, activation)
    assert_computes_the_same(sparse, layer, x, torch.tensor(2.0), activation)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_a_residual_of_another_dtype_is_converted_as_torch_does(name, dtype):
    layer, shape = ALL_LAYERS[name]
    layer, x = pruned(layer), torch.randn(shape)
    dense = FusedLayer(layer, "relu")
    residual = (3 * torch.randn(layer(x).shape)).to(dtype)
    got, expected = SparseLayer(dense)(x, residual), dense(x, residual)
    assert got.dtype == expected.dtype
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_a_residual_on_another_device_is_refused(name):
    layer, shape = ALL_LAYERS[name]
    sparse, x = SparseLayer(pruned(layer)), torch.randn(shape)
    with pytest.raises(TypeError, match="expected a residual on the CPU, got one on meta"):
        sparse(x, torch.empty(sparse(x).shape, device="meta"))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.data())
def test_a_convolution_of_any_geometry_computes_the_dense_output(data):
    layer, sizes = drawn_convolution(data, data.draw(st.integers(1, 2)), 8, 6)
    pruned(layer, rate=data.draw(st.sampled_from([0.1, 0.5])))
    with torch.no_grad():
        assert_computes_the_same(SparseLayer(layer), layer, torch.randn(data.draw(st.integers(1, 5)), 4, *sizes))


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_weights_without_zeros_and_with_zeros_alone(rate):
    layer = pruned(nn.Conv2d(4, 5, 3), rate)
    assert_computes_the_same(SparseLayer(layer), layer, torch.randn(1, 4, 6, 6))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (0, 0)])
def test_layers_without_inputs_or_outputs(sizes):
    layer = nn.Linear(*sizes)
    nn.init.constant_(layer.bias, 2.0)
    x = torch.randn(3, sizes[0])
    assert torch.equal(SparseLayer(layer)(x), layer(x))


def test_inputs_of_any_memory_format():
    layer = pruned(nn.Conv2d(4, 5, 3, stride=2, padding=1))
    sparse = SparseLayer(layer)
    x = torch.randn(2, 4, 12, 10)
    views = (x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[:, :, ::2, 1:], x[:1].expand(3, 4, 12, 10))
    for view in (*views, torch._neg_view(x)):
        assert_computes_the_same(sparse, layer, view)
    linear = pruned(nn.Linear(4, 5))
    assert_computes_the_same(SparseLayer(linear), linear, x.transpose(1, 3))


def test_sizes_may_change_from_call_to_call():
    layer = pruned(nn.Conv2d(4, 5, 3, padding=1))
    sparse = SparseLayer(layer)
    for shape in ((1, 4, 8, 8), (2, 4, 8, 8), (1, 4, 5, 9), (1, 4, 8, 8)):
        assert_computes_the_same(sparse, layer, torch.randn(shape))


def test_several_threads_may_call_it():
    sparse = SparseLayer(pruned(nn.Conv2d(4, 5, 3, padding=1)))
    inputs = [torch.randn(1, 4, n, n) for n in range(4, 30)] * 10
    expected = [sparse(x) for x in inputs]
    with ThreadPoolExecutor(4) as threads:
        assert all(map(torch.equal, threads.map(torch.no_grad()(sparse), inputs), expected))


def test_the_number_of_threads_may_change():
    layer = pruned(nn.Conv2d(4, 8, 3, padding=1))
    sparse, x, before = SparseLayer(layer), torch.randn(2, 4, 20, 20), torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            assert_computes_the_same(sparse, layer, x)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_it_can_be_called_in_a_forked_process():
    """libgomp would wait for threads that a forked process does not have."""
    sparse, x, before = SparseLayer(pruned(nn.Linear(200, 200))), torch.randn(1, 200), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        sparse(x)
        child = multiprocessing.get_context("fork").Process(target=sparse, args=(x,))
        child.start()
        child.join(30)
        ended = child.exitcode
        child.kill()
        assert ended == 0
    finally:
        torch.set_num_threads(before)


def test_infinite_inputs_reach_only_outputs_with_a_weight_for_them():
    layer = nn.Linear(3, 2)
    layer.weight.data = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    x = torch.tensor([[1.0, float("inf"), float("nan")]])
    assert torch.equal(SparseLayer(layer)(x).isfinite(), torch.tensor([[True, False]]))


WRONG_INPUTS = {
    "dtype": (torch.zeros(1, 4, 6, 6).double(), TypeError, r"got input of torch\.float64 on cpu; use the dense model"),
    "device": (torch.zeros(1, 4, 6, 6).to("meta"), TypeError, r"got input of torch\.float32 on meta"),
    "layout": (torch.zeros(1, 4, 6, 6).to_sparse(), TypeError, r"on cpu torch\.sparse_coo; use the dense model"),
    "channels": (
        torch.zeros(1, 3, 6, 6),
        ValueError,
        r"expected 4 input channels, got a tensor of shape \(1, 3, 6, 6\)",
    ),
    "dimensions": (torch.zeros(1, 1, 4, 6, 6), ValueError, "expected 4 input channels"),
    "too few dimensions": (torch.zeros(4, 6), ValueError, "expected 4 input channels"),
    "small": (torch.zeros(1, 4, 2, 6), ValueError, r"at least the window's size \(3, 3\), got \(2, 6\)"),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_inputs_that_are_refused(name):
    x, error, message = WRONG_INPUTS[name]
    with pytest.raises(error, match=message):
        SparseLayer(pruned(nn.Conv2d(4, 5, 3)))(x)


@pytest.mark.parametrize("of", ["input", "residual"])
def test_inputs_that_require_a_gradient_are_refused(of):
    sparse, x, residual = SparseLayer(pruned(nn.Linear(4, 5))), torch.zeros(1, 4), torch.zeros(1, 5)
    (x if of == "input" else residual).requires_grad_()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="expected an input without gradient"):
        sparse(x, residual)
    assert not sparse(x, residual).requires_grad


def test_a_folded_batch_norm_checks_the_number_of_dimensions():
    sparse = SparseLayer(FusedLayer(pruned(nn.Linear(6, 6)), dims=2))
    with pytest.raises(ValueError, match="expected an input of 2 dimensions, got 3"):
        sparse(torch.zeros(1, 2, 6))


def test_a_model_cast_to_another_dtype_is_refused():
    sparse = SparseLayer(pruned(nn.Linear(6, 6)))
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
    with torch.enable_grad(), pytest.raises(RuntimeError, match="expected a call that is not traced"):
        torch.jit.trace(SparseLayer(pruned(nn.Linear(6, 6))), torch.randn(2, 6))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("called", [False, True])
def test_tensors_without_memory_are_refused(called):
    from torch._subclasses.fake_tensor import FakeTensorMode

    sparse, x = SparseLayer(pruned(nn.Linear(6, 6))), torch.randn(2, 6)
    if called:
        sparse(x)
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        pytest.raises((RuntimeError, ValueError), match="expected"),
    ):
        sparse(mode.from_tensor(x))

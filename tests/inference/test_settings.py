"""What is set in torch, and tensors without memory of their own, do not lead the kernel to other memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from feather_param.inference.fusing.fuse import FusedLayer
from feather_param.inference.layers import SparseLayer
from feather_param.inference.pooling import FastMaxPool
from tests.inference.pruned import pruned

LAYERS = {
    "linear": (SparseLayer(FusedLayer(pruned(nn.Linear(20, 9)), "relu")), (40, 20)),
    "linear, one token": (SparseLayer(pruned(nn.Linear(20, 9))), (1, 20)),
    "convolution": (SparseLayer(FusedLayer(pruned(nn.Conv2d(16, 9, 3, padding=1)), "gelu")), (2, 16, 30, 30)),
    "max pooling": (FastMaxPool(nn.MaxPool2d(3, 2, 1)), (2, 16, 30, 30)),
}
SETTINGS = {
    **{str(dtype): (torch.set_default_dtype, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)},
    "meta": (torch.set_default_device, "meta"),
    "deterministic": (torch.use_deterministic_algorithms, True),
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=LAYERS)
def layer(request):
    layer, shape = LAYERS[request.param]
    return copy.deepcopy(layer), torch.randn(shape)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("planned", [False, True])
def test_the_defaults_of_torch_do_not_matter(layer, setting, planned):
    layer, x = layer
    expected = layer(x)
    layer = layer if planned else copy.deepcopy(layer)
    change, value = SETTINGS[setting]
    try:
        change(value)
        got = layer(x)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.use_deterministic_algorithms(False)
    assert torch.equal(got, expected)


class Wrapped(torch.Tensor):
    """A tensor whose elements are those of another."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*(arg.inner if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))


@pytest.mark.parametrize("without", [lambda x: torch._efficientzerotensor(*x.shape), Wrapped])
def test_tensors_without_memory_are_refused_or_given_to_torch(layer, without):
    layer, x = layer
    if isinstance(layer, FastMaxPool) and without is Wrapped:
        assert torch.equal(layer(without(x)), layer(x))
        return
    expected = layer(x)
    with pytest.raises(RuntimeError, match="expected tensors with memory, got one without"):
        layer(without(x))
    if isinstance(layer, SparseLayer) and x.dim() == 4:
        with pytest.raises(RuntimeError, match="expected tensors with memory, got one without"):
            SparseLayer(pruned(nn.Conv2d(16, 9, 3, padding=1)))(x, without(expected))


def test_a_pending_negation_is_read(layer):
    layer, x = layer
    assert torch.equal(layer(torch._neg_view(x)), layer(-x))


def test_max_pooling_gives_other_layouts_to_torch():
    pool, x = nn.MaxPool2d(2), torch.randn(1, 2, 4, 4)
    assert torch.equal(FastMaxPool(pool)(x.to_mkldnn()).to_dense(), pool(x))


@pytest.mark.parametrize("name", ["block_start", "columns"])
@pytest.mark.parametrize("shape", [(1, 6), (3, 6)])
@pytest.mark.parametrize("write", [lambda t: t.data.fill_(2**30), lambda t: t.numpy().fill(-(2**30))])
def test_indices_written_unseen_are_not_used(name, shape, write):
    """A write through `.data` or numpy does not change the version of the tensor."""
    for rows in (1, 4):
        dense = nn.Linear(6, 4)
        if rows == 1:
            dense.weight.data.fill_diagonal_(0)
            dense.weight.data[:, 4:] = 0
            dense.weight.data[0] = 0
        sparse, x = SparseLayer(dense), torch.randn(shape)
        expected = sparse(x)
        write(getattr(sparse, name))
        assert torch.equal(sparse(x), expected)
        assert sparse(torch.randn(7, 6)).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning", "ignore:.*torch.jit.script:DeprecationWarning")
def test_a_derivative_in_forward_mode_is_refused():
    from torch.autograd import forward_ad

    sparse, x = SparseLayer(pruned(nn.Linear(6, 4))), torch.randn(2, 6)
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="expected an input without gradient"):
            sparse(forward_ad.make_dual(x, x))
        assert torch.equal(sparse(x), sparse(x))


def test_the_plans_of_few_sizes_are_kept():
    pool = FastMaxPool(nn.MaxPool1d(2))
    for n in range(2, 40):
        pool(torch.randn(1, 1, n))
    assert len(pool._plans) == 16

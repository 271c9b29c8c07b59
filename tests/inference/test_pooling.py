"""Max pooling by the kernel returns the bits of torch's."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from feather_param.inference.engine import plan
from feather_param.inference.pooling import MAX_POOLS, FastMaxPool


@pytest.fixture(autouse=True)
def scratch_of_nan(monkeypatch):
    """Fill the kernel's memory with NaN, which must not reach the output."""
    monkeypatch.setattr(plan, "new_scratch", lambda floats: torch.full((floats,), math.nan))


def assert_same_bits(pool, x):
    fast, expected = FastMaxPool(pool)(x), pool(x)
    assert fast.shape == expected.shape
    assert torch.equal(fast.view(torch.int32), expected.view(torch.int32))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_every_geometry(data):
    dims = data.draw(st.integers(1, 3))
    numbers = lambda low, high: data.draw(st.tuples(*[st.integers(low, high)] * dims))  # noqa: E731
    window, stride, dilation = numbers(1, 5), numbers(1, 4), numbers(1, 3)
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in window)
    sizes = [d * (k - 1) + 1 + more for d, k, more in zip(dilation, window, numbers(0, 20), strict=True)]
    pool = MAX_POOLS[dims - 1](window, stride, padding, dilation, ceil_mode=data.draw(st.booleans()))
    x = torch.randn(*data.draw(st.sampled_from([(1, 1), (2, 3), (5,)])), *sizes)
    x[torch.rand_like(x) < 0.1] = data.draw(st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf]))
    assert_same_bits(pool, x)


def test_a_window_without_a_finite_element():
    assert_same_bits(nn.MaxPool2d(2), torch.full((1, 1, 4, 4), -math.inf))
    assert_same_bits(nn.MaxPool2d(3, 1, 1), torch.tensor([[[[math.nan, -math.inf]]]]))


def test_views_and_large_images():
    pool = nn.MaxPool2d(3, 2, 1)
    x = torch.randn(2, 12, 80, 90)
    for view in (x, x.transpose(2, 3), x[:, ::3, 1:], x.to(memory_format=torch.channels_last), torch._neg_view(x)):
        assert_same_bits(pool, view)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_several_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in ((1, 1, 90, 70), (1, 2, 9, 9), (2, 7, 40, 40)):
            assert_same_bits(nn.MaxPool2d(3, 2, 1), torch.randn(shape))
    finally:
        torch.set_num_threads(before)


def test_the_tables_of_few_sizes_are_kept():
    fast = FastMaxPool(nn.MaxPool1d(2))
    for n in range(2, 100):
        fast(torch.randn(1, 1, n))
    assert len(fast._plans) == 16


def test_other_inputs_are_given_to_torch():
    fast = FastMaxPool(nn.MaxPool2d(2))
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    fast(x).sum().backward()
    assert x.grad is not None
    assert fast(x.detach().double()).dtype == torch.float64
    assert fast(torch.empty(0, 2, 4, 4)).shape == (0, 2, 2, 2)
    with pytest.raises(RuntimeError):
        fast(torch.randn(1, 2, 1, 1))


def test_a_copy_computes_the_same():
    fast, x = FastMaxPool(nn.MaxPool1d(3)), torch.randn(2, 3, 40)
    assert torch.equal(fast(x), copy.deepcopy(fast)(x))


def test_indices_are_refused():
    with pytest.raises(ValueError, match="expected a layer without return_indices"):
        FastMaxPool(nn.MaxPool2d(2, return_indices=True))

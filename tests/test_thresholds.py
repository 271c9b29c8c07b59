"""The k-th magnitude and the counts, against sorting."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feather_param.thresholds import PruneCount, count_pruned, kth_magnitude
from tests import twins

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@given(
    tensors=st.lists(
        st.tuples(
            st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-42]) | st.floats(-1e4, 1e4, width=16), max_size=12),
            st.sampled_from(DTYPES),
        ),
        min_size=1,
        max_size=4,
    ),
    share=st.floats(0, 1),
)
@settings(max_examples=300, deadline=None)
def test_kth_and_counts_equal_sorting(tensors, share):
    weights = {str(i): torch.tensor(values, dtype=dtype) for i, (values, dtype) in enumerate(tensors)}
    total = sum(weight.numel() for weight in weights.values())
    k = round(share * total)
    threshold = kth_magnitude(weights, k)
    assert threshold.dtype == torch.float32
    assert threshold.shape == ()
    assert float(threshold) == twins.threshold(weights.values(), k)
    counts = count_pruned(weights, threshold, k)
    pruned = twins.zeros(weights.values(), k)
    for name, weight in weights.items():
        mine, pruned = pruned[: weight.numel()], pruned[weight.numel() :]
        assert counts[name].zeros == sum(mine)
        assert 0 <= counts[name].ties <= counts[name].zeros


@pytest.mark.parametrize("k", [0, 1, 2, 499, 500, 998, 999])
def test_layouts(k):
    base = torch.randn(10, 10, 10)
    weights = {"a": base.transpose(0, 2), "b": base[:, ::2], "c": torch.empty(0, 3), "d": torch.tensor([[1.0]])}
    assert float(kth_magnitude(weights, k)) == twins.threshold(weights.values(), k)


def test_the_weights_are_not_touched():
    weight = torch.randn(100)
    before = weight.clone()
    kth_magnitude({"w": weight}, 50)
    assert torch.equal(weight, before)


def test_subnormal_magnitudes_are_told_apart():
    tiny = torch.tensor([1, 2, 3, 4], dtype=torch.int32).view(torch.float32)
    assert torch.equal(kth_magnitude({"w": tiny}, 3), tiny[2])


def test_a_float64_weight_ranks_as_float32():
    weights = {"w": torch.tensor([1.0, 1.0 + 1e-12, 2.0], dtype=torch.float64)}
    assert count_pruned(weights, kth_magnitude(weights, 1), 1) == {"w": PruneCount(1, 1)}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -math.nan])
@pytest.mark.parametrize("k", [0, 1, 3, 5, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_reported_by_name(bad, k, dtype):
    weights = {"good": torch.randn(3, dtype=dtype), "bad.weight": torch.tensor([1.0, bad, 2.0], dtype=dtype)}
    with pytest.raises(ValueError, match=r"finite weights, got NaN or infinity in bad\.weight; .*learning rate"):
        kth_magnitude(weights, k)


@pytest.mark.parametrize("k", [-1, 7])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match="k between 0 and the number of weights, 6, got"):
        kth_magnitude({"w": torch.ones(6)}, k)


def test_with_a_zero_threshold_every_zero_counts():
    weights = {"a": torch.zeros(3), "b": torch.tensor([0.0, 1.0])}
    assert count_pruned(weights, torch.tensor(0.0), 2) == {"a": PruneCount(3, 3), "b": PruneCount(1, 1)}

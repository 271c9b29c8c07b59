"""The k-th magnitude and the counts, against sorting."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feather_param.ops import kth_cpu, threads
from feather_param.ops.count import PruneCount, count_pruned
from feather_param.ops.kth import kth_magnitude
from feather_param.ops.kth_cpu import _SAMPLE
from feather_param.ops.kth_gpu import kth_by_bits
from feather_param.parametrizations import feather_threshold
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
    assert threshold.dtype == (torch.float64 if any(dtype == torch.float64 for _, dtype in tensors) else torch.float32)
    assert threshold.shape == ()
    assert float(threshold) == twins.threshold(weights.values(), k)
    counts = count_pruned(weights, threshold, k)
    pruned = twins.zeros(weights.values(), k)
    for name, weight in weights.items():
        mine, pruned = pruned[: weight.numel()], pruned[weight.numel() :]
        assert counts[name].zeros == sum(mine)
        kept = [m for m, gone in zip(twins.magnitudes([weight]), mine, strict=True) if not gone]
        assert counts[name].ties == kept.count(float(threshold))


LARGE = {
    "normal": lambda n: torch.randn(n),
    "few values": lambda n: torch.randint(0, 5, (n,)).float(),
    "all equal": lambda n: torch.full((n,), -0.5),
    "sorted": lambda n: torch.linspace(-1, 1, n),
    "periodic": lambda n: (torch.arange(n) % 9).float(),
    "outliers": lambda n: torch.where(torch.rand(n) < 1e-4, 1e4, 1e-4) * torch.randn(n),
    "hidden from the sample": lambda n: (torch.arange(n) % (n // _SAMPLE) != 0).float() * torch.randn(n),
}


@pytest.mark.parametrize("values", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.3, 0.5, 0.95, 0.9999, 1.0])
def test_kth_of_many(values, dtype, share):
    weight = values(5 * _SAMPLE + 3).to(dtype)
    weights = {"a": weight[: _SAMPLE + 1], "b": weight[_SAMPLE + 1 :].view(2, -1)}
    k = round(share * weight.numel())
    precise = weight if dtype == torch.float64 else weight.float()
    expected = precise.abs().sort().values[k - 1] if k else torch.zeros((), dtype=precise.dtype)
    assert torch.equal(kth_magnitude(weights, k), expected)


def test_dtypes_may_be_mixed():
    weights = {"a": torch.randn(90, dtype=torch.float64), "b": torch.randn(50).bfloat16(), "c": torch.randn(40).half()}
    for k in (0, 1, 60, 179, 180):
        assert float(kth_magnitude(weights, k)) == twins.threshold(weights.values(), k)


def test_a_bracket_that_misses_costs_no_exactness(monkeypatch):
    monkeypatch.setattr(kth_cpu, "_bracket", lambda bits, k, total: (1, 2))
    weights = {"w": torch.randn(5 * _SAMPLE)}
    expected = weights["w"].abs().sort().values[999]
    assert torch.equal(kth_magnitude(weights, 1000), expected)


def test_threads_change_nothing(monkeypatch):
    weights = {"a": torch.randn(300_000), "b": torch.randn(500, 700)}
    alone = kth_magnitude(weights, 400_000)
    monkeypatch.setattr(threads, "_FEWEST", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(kth_magnitude(weights, 400_000), alone)


@pytest.mark.parametrize("theta", [1.0, 0.5])
def test_threads_change_nothing_in_the_operator(theta, monkeypatch):
    weight = torch.randn(900_001)
    alone = feather_threshold(weight, torch.tensor(1.5), theta, p=1.0)
    monkeypatch.setattr(threads, "_FEWEST", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(feather_threshold(weight, torch.tensor(1.5), theta, p=1.0), alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_counting_bit_by_bit_equals_the_bracket(dtype):
    """What runs on other devices, tried on a CPU."""
    tensors = [torch.randn(40, 5).to(dtype), torch.zeros(7, dtype=dtype), torch.empty(0, dtype=dtype)]
    for k in (0, 1, 7, 8, 100, 206, 207):
        kth = kth_by_bits(tensors, k, torch.clone)
        assert kth.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert float(kth) == twins.threshold(tensors, k)
    tensors[0][0, 0] = math.inf
    assert kth_by_bits(tensors, 100, torch.clone).isnan()


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


def test_a_float64_weight_ranks_as_float64():
    weights = {"w": torch.tensor([1.0 + 1e-12, 1.0, 1e300, 1e-300], dtype=torch.float64)}
    for k, t in enumerate([0.0, 1e-300, 1.0, 1.0 + 1e-12, 1e300]):
        assert float(kth_magnitude(weights, k)) == t
        assert count_pruned(weights, kth_magnitude(weights, k), k)["w"].zeros == k


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
    assert count_pruned(weights, torch.tensor(0.0), 2) == {"a": PruneCount(3), "b": PruneCount(1)}

"""The k-th magnitude and the counts equal those that sorting gives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feather_param.ops import kth_cpu
from feather_param.ops.count import count_pruned
from feather_param.ops.kth import kth_magnitude
from feather_param.ops.kth_cpu import _SAMPLE
from feather_param.ops.kth_gpu import kth_by_bits
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
    fraction=st.floats(0, 1),
)
@settings(max_examples=300)
def test_the_kth_magnitude_and_the_counts_equal_those_of_sorting(tensors, fraction):
    weights = {str(i): torch.tensor(values, dtype=dtype) for i, (values, dtype) in enumerate(tensors)}
    total = sum(weight.numel() for weight in weights.values())
    k = round(fraction * total)
    threshold = kth_magnitude(weights, k)
    assert threshold.dtype == (torch.float64 if any(dtype == torch.float64 for _, dtype in tensors) else torch.float32)
    assert threshold.shape == ()
    assert float(threshold) == twins.threshold(weights.values(), k)
    counts = count_pruned(weights, threshold, k)
    pruned = twins.zeros(weights.values(), k)
    for name, weight in weights.items():
        own, pruned = pruned[: weight.numel()], pruned[weight.numel() :]
        assert counts[name].zeros == sum(own)
        kept = [m for m, gone in zip(twins.magnitudes([weight]), own, strict=True) if not gone]
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
@pytest.mark.parametrize("fraction", [0.0, 1e-5, 0.3, 0.5, 0.95, 0.9999, 1.0])
def test_the_kth_magnitude_of_many_elements_is_exact(values, dtype, fraction):
    weight = values(5 * _SAMPLE + 3).to(dtype)
    weights = {"a": weight[: _SAMPLE + 1], "b": weight[_SAMPLE + 1 :].view(2, -1)}
    k = round(fraction * weight.numel())
    precise = weight if dtype == torch.float64 else weight.float()
    expected = precise.abs().sort().values[k - 1] if k else torch.zeros((), dtype=precise.dtype)
    assert torch.equal(kth_magnitude(weights, k), expected)


def test_weights_may_have_different_dtypes():
    weights = {"a": torch.randn(90, dtype=torch.float64), "b": torch.randn(50).bfloat16(), "c": torch.randn(40).half()}
    for k in (0, 1, 60, 179, 180):
        assert float(kth_magnitude(weights, k)) == twins.threshold(weights.values(), k)


def test_the_result_is_exact_if_the_bracket_misses(monkeypatch):
    monkeypatch.setattr(kth_cpu, "_bracket", lambda bits, k, total: (1, 2))
    weights = {"w": torch.randn(5 * _SAMPLE)}
    expected = weights["w"].abs().sort().values[999]
    assert torch.equal(kth_magnitude(weights, 1000), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_counting_bit_by_bit_gives_the_same_as_the_bracket(dtype):
    """The method for other devices, run on a CPU."""
    tensors = [torch.randn(40, 5).to(dtype), torch.zeros(7, dtype=dtype), torch.empty(0, dtype=dtype)]
    for k in (0, 1, 7, 8, 100, 206, 207):
        (kth,) = kth_by_bits([tensors], [k], torch.clone)
        assert kth.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert float(kth) == twins.threshold(tensors, k)
    tensors[0][0, 0] = math.inf
    assert kth_by_bits([tensors], [100], torch.clone).isnan()


@pytest.mark.parametrize("k", [0, 1, 2, 499, 500, 998, 999])
def test_weights_may_have_any_memory_layout(k):
    base = torch.randn(10, 10, 10)
    weights = {"a": base.transpose(0, 2), "b": base[:, ::2], "c": torch.empty(0, 3), "d": torch.tensor([[1.0]])}
    assert float(kth_magnitude(weights, k)) == twins.threshold(weights.values(), k)


def test_the_weights_are_not_changed():
    weight = torch.randn(100)
    before = weight.clone()
    kth_magnitude({"w": weight}, 50)
    assert torch.equal(weight, before)


def test_the_storage_of_a_weight_can_be_resized_afterwards():
    weight = torch.randn(100)
    kth_magnitude({"weight": weight}, 50)
    weight.untyped_storage().resize_(0)  # as FSDP2 does


def test_subnormal_magnitudes_are_distinguished():
    tiny = torch.tensor([1, 2, 3, 4], dtype=torch.int32).view(torch.float32)
    assert torch.equal(kth_magnitude({"w": tiny}, 3), tiny[2])


def test_a_float64_weight_is_ranked_in_float64():
    weights = {"w": torch.tensor([1.0 + 1e-12, 1.0, 1e300, 1e-300], dtype=torch.float64)}
    for k, t in enumerate([0.0, 1e-300, 1.0, 1.0 + 1e-12, 1e300]):
        assert float(kth_magnitude(weights, k)) == t
        assert count_pruned(weights, kth_magnitude(weights, k), k)["w"].zeros == k


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -math.nan])
@pytest.mark.parametrize("k", [0, 1, 3, 5, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_names_the_weight_with_nan_or_infinity(bad, k, dtype):
    weights = {"good": torch.randn(3, dtype=dtype), "bad.weight": torch.tensor([1.0, bad, 2.0], dtype=dtype)}
    with pytest.raises(ValueError, match=r"finite weights, got NaN or infinity in bad\.weight; .*learning rate"):
        kth_magnitude(weights, k)


@pytest.mark.parametrize("k", [-1, 7])
def test_k_must_be_between_0_and_the_number_of_weights(k):
    with pytest.raises(ValueError, match="k between 0 and the number of weights, 6, got"):
        kth_magnitude({"w": torch.ones(6)}, k)

"""The Triton kernels, run on a CPU by triton's interpreter, each check in a new process."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.interpreter import interpret


def check_histogram() -> None:
    from feather_param.ops.kth_gpu import _programs
    from feather_param.ops.kth_triton import BLOCK, add_histograms

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        torch.manual_seed(0)
        values = torch.cat([torch.randn(5000), torch.zeros(100), torch.full((50,), -1.0)]).to(dtype)
        if dtype != torch.bfloat16:  # the interpreter does not convert its subnormal numbers correctly
            values[0] = 1e-40
        bits = values.float().abs().view(torch.int32)
        for width, shift in ((8, 23), (8, 15), (7, 0)):
            for prefix in (0, int(bits[7]) >> (shift + width)):
                histograms = torch.ones(3, 256, dtype=torch.int64)
                sizes = (4100, 0, len(values) - 4100)  # the sets lie one after the other
                programs = _programs(sizes, BLOCK, torch.device("cpu"))
                add_histograms(histograms, values, programs, torch.full((3,), prefix, dtype=torch.int32), shift, width)
                for histogram, part in zip(histograms, bits.split(sizes), strict=True):
                    chosen = part[part >> (shift + width) == prefix]
                    expected = torch.bincount((chosen >> shift) & ((1 << width) - 1), minlength=256)
                    assert torch.equal(histogram, expected + 1), (dtype, width, shift, prefix)


def check_kth() -> None:
    from feather_param.ops import kth_triton
    from feather_param.ops.kth_gpu import kth_by_bits, kth_by_digits

    torch.manual_seed(0)
    tensors = [torch.randn(30, 70), torch.zeros(0), torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)]
    tensors += [torch.randn(500)[::3], torch.full((40,), 0.25), torch.zeros(10), torch.tensor([1e-42, 3e38])]
    mixed = [tensors[0].half(), tensors[1].double(), *tensors[2:]]
    halves = [tensor.clamp(-1e4, 1e4).half() for tensor in tensors]
    for group in (tensors, mixed, halves):
        total = sum(tensor.numel() for tensor in group)
        for k in (0, 1, 5, 11, 60, total // 2, total - 1, total):
            expected = kth_by_bits([group], [k], lambda n: n)
            assert torch.equal(kth_by_digits([group], [k], lambda n: n, kth_triton), expected), k
    for bad in (math.nan, math.inf, -math.inf):
        found = kth_by_digits([[torch.tensor([bad])], tensors], [1, 5], lambda n: n, kth_triton)
        assert found.isnan().tolist() == [True, False]
    sets, ks = [tensors, halves, [torch.ones(3)]], [70, 0, 3]  # a prefix of its own for each set
    expected = kth_by_bits(sets, ks, lambda n: n)
    for given in (ks, torch.tensor(ks)):  # a tensor that a CUDA graph reads may change between its replays
        assert torch.equal(kth_by_digits(sets, given, lambda n: n, kth_triton), expected)
        assert torch.equal(kth_by_bits(sets, given, lambda n: n), expected)


def check_kth_of_shards() -> None:
    """Two threads stand in for two processes with a part of the weights each."""
    from feather_param.ops import kth_triton
    from feather_param.ops.kth_gpu import kth_by_bits, kth_by_digits

    torch.manual_seed(0)
    weights = [torch.randn(300), torch.randn(1200), torch.zeros(7), torch.full((40,), 0.25)]
    parts = weights[:1] + weights[2:3], weights[1:2] + weights[3:]
    barrier, counts = threading.Barrier(2, timeout=60), {}
    lock, add_histograms = threading.Lock(), kth_triton.add_histograms

    def one_at_a_time(*arguments) -> None:  # the interpreter does not support threads
        with lock:
            add_histograms(*arguments)

    def run(rank: int, k: int) -> torch.Tensor:
        def add_up(histogram: torch.Tensor) -> torch.Tensor:
            counts[rank] = histogram
            barrier.wait()
            total = counts[0] + counts[1]
            barrier.wait()
            return total

        return kth_by_digits([parts[rank]], [k], add_up, kth_triton)

    kth_triton.add_histograms = one_at_a_time
    with ThreadPoolExecutor(2) as pool:
        for k in (0, 1, 7, 8, 700, 1547):
            expected = kth_by_bits([weights], [k], lambda n: n)
            assert all(torch.equal(kth, expected) for kth in pool.map(run, (0, 1), (k, k))), k


def check_shrink() -> None:
    from feather_param.ops import operator, operator_triton
    from tests import twins

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        torch.manual_seed(0)
        threshold = torch.tensor(0.5)
        near = 0.5 * (1.0 + torch.tensor([-1.0, 0.0, 1.0, 2.0, 50.0, 1e5]) * 2.0**-23)
        weight = torch.cat([torch.randn(3000), near, -near, torch.zeros(3)]).to(dtype)
        shapes = (weight, weight[:3000].view(10, 20, 3, 5).to(memory_format=torch.channels_last), weight[::2])
        assert operator_triton.supports(weight)
        for p in (0.25, 0.5, 0.8, 1.0, 2.0, 3.0, 7.3, math.inf):
            for shaped in shapes:
                out, pruned = operator._shrink_on_gpu(shaped, threshold, p, True, operator_triton)
                assert torch.equal(pruned, shaped.abs().float() <= 0.5)
                assert out.dtype == dtype
                assert out.shape == shaped.shape
                exact = twins.operator(shaped, 0.5, p)
                # The bound of the other computations: 8 ulp of the dtype, relative. Results in fp16 may be subnormal.
                info = torch.finfo(dtype)
                bound = 8 * info.eps * exact.abs() + info.smallest_normal * info.eps
                assert ((out.double() - exact).abs() <= bound).all(), (dtype, p)
            out, pruned = operator._shrink_on_gpu(weight, threshold, p, False, operator_triton)
            assert pruned is None
        lost, _ = operator._shrink_on_gpu(torch.tensor([math.nan, 1.0]), threshold, 3.0, False, operator_triton)
        assert lost.isnan().tolist() == [True, False]
    far = torch.cat([torch.randn(100), 0.5 + torch.rand(100)])  # far above a threshold, a small p still shrinks
    for p in (0.25, 0.5, 0.8, 3.0):
        out, _ = operator._shrink_on_gpu(far, torch.tensor(1e-12), p, False, operator_triton)
        exact = twins.operator(far, float(torch.tensor(1e-12)), p)
        assert ((out.double() - exact).abs() <= 8 * 2.0**-23 * exact.abs()).all(), p
    tiny = torch.tensor([1e-40, -1e-45, 2e-38, 0.0])
    for p in (0.25, 0.5, 0.8, 1.0, 2.0, 3.0, 7.3, math.inf):
        same, _ = operator._shrink_on_gpu(tiny, torch.tensor(0.0), p, False, operator_triton)
        assert torch.equal(same, tiny)
        double, _ = operator._shrink_on_gpu(weight, threshold.double(), p, False, operator_triton)
        assert torch.equal(double, operator._shrink_on_gpu(weight, threshold, p, False, operator_triton)[0])


def check_loading() -> None:
    from feather_param.ops import kth_triton, operator_triton
    from feather_param.ops.gpu_kernels import kernels

    assert kernels(torch.device("cpu")) == (kth_triton, operator_triton)


CHECKS = [check_histogram, check_kth, check_kth_of_shards, check_shrink, check_loading]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_kernels_are_exact_in_the_interpreter(check):
    interpret(check)


def test_there_are_no_kernels_for_a_device_that_triton_does_not_support():
    from feather_param.ops.gpu_kernels import kernels

    kernels.cache_clear()
    assert kernels(torch.device("cpu")) is None  # the compiler does not support CPUs

"""Training on a GPU. These tests are skipped without one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import feather_param
from feather_param.ops.gpu_kernels import kernels
from feather_param.ops.kth import kth_magnitude
from feather_param.ops.kth_gpu import kth_by_bits, kth_by_digits
from tests import twins
from tests.training import zeros_in

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise an error where the host waits for the device."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.Linear(16, 4)).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [0, 1, 5000, 9999, 10000])
def test_the_kth_magnitude_equals_that_of_a_cpu(dtype, k):
    weights = {"a": torch.randn(90, 100).to(dtype), "b": torch.zeros(1000, dtype=dtype)}
    on_gpu = {name: weight.cuda() for name, weight in weights.items()}
    assert torch.equal(kth_magnitude(on_gpu, k).cpu(), kth_magnitude(weights, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ks", [[70, 3, 0], [2105, 500, 3], [1, 250, 2]])
def test_the_kth_magnitudes_of_several_sets_equal_those_of_a_cpu(dtype, ks):
    gpu = kernels(torch.device("cuda"))
    if gpu is None:
        pytest.skip("needs triton")
    sets = [[torch.randn(30, 70), torch.zeros(5)], [torch.randn(500)], [torch.ones(3)]]
    sets = [[tensor.to(dtype) for tensor in tensors] for tensors in sets]
    on_gpu = [[tensor.cuda() for tensor in tensors] for tensors in sets]
    expected = kth_by_bits(sets, ks, lambda n: n)
    for given in (ks, torch.tensor(ks, device="cuda")):
        assert torch.equal(kth_by_digits(on_gpu, given, lambda n: n, gpu.kth).cpu(), expected)


@pytest.mark.parametrize("p", [0.25, 0.5, 1.0, 2.0, 3.0, 5.0, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_operator_equals_the_equation_within_rounding(dtype, p):
    weight = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[:64] = (0.5 * (1 + torch.arange(64) * 2.0**-23)).to(dtype)
    got = feather_param.parametrizations.feather_threshold(weight.cuda(), torch.tensor(0.5, device="cuda"), p=p)
    exact = twins.operator(weight, 0.5, p)
    info = torch.finfo(dtype)
    assert got.dtype == dtype
    assert ((got.cpu().double() - exact).abs() <= 8 * info.eps * exact.abs() + info.smallest_normal * info.eps).all()


@pytest.mark.parametrize("p", [0.25, 0.5, 1.0, 2.0, 3.0, 5.0, float("inf")])
def test_a_zero_threshold_returns_subnormal_numbers_unchanged(p):
    weight = torch.tensor([1e-40, -1e-45, 2e-38, 0.0, 3.0], device="cuda")
    for threshold in (torch.zeros((), device="cuda"), torch.zeros(())):
        assert torch.equal(feather_param.parametrizations.feather_threshold(weight, threshold, p=p), weight)


@pytest.mark.parametrize("name", ["global_magnitude", "uniform", "erk", "square_root", "lamp", "normalised"])
def test_an_allocation_gives_the_zeros_of_a_cpu(name):
    allocation = getattr(feather_param.allocations, name)
    on_gpu = feather_param.plan(net(), final_rate=0.9, allocation=allocation)
    assert on_gpu.rows == feather_param.plan(net().cpu(), final_rate=0.9, allocation=allocation).rows


@pytest.mark.parametrize("name", ["global_magnitude", "uniform", "erk", "square_root"])
def test_a_step_does_not_wait_for_the_device(name):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    allocation = getattr(feather_param.allocations, name)
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=10, allocation=allocation)
    x, y = torch.randn(8, 3, 6, 6, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda")
    with no_waiting():
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            controller.step()
    controller.desparsify()
    assert zeros_in(model) == round(0.9 * 2328)


@pytest.mark.parametrize("name", ["global_magnitude", "erk"])
def test_a_cuda_graph_can_record_a_step_and_a_forward_pass(name):
    model = net()
    allocation = getattr(feather_param.allocations, name)
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=10, end_step=0, allocation=allocation)
    x = torch.randn(8, 3, 6, 6, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            controller.step()
            model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        controller.step()
        out = model(x)
    buffer = model[0].parametrizations.weight[0].threshold
    before = buffer.clone()
    with torch.no_grad():
        for layer in (model[0], model[3], model[4]):
            layer.parametrizations.weight.original.mul_(2.0)
    graph.replay()
    assert torch.equal(buffer, 2 * before)
    assert torch.equal(buffer, controller.threshold)
    assert torch.allclose(out, model(x), atol=1e-5)


@pytest.mark.parametrize("name", ["global_magnitude", "erk", "lamp", "normalised"])
def test_nan_is_refused_one_step_later(name):
    model = net()
    allocation = getattr(feather_param.allocations, name)
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=10, allocation=allocation)
    with torch.no_grad():
        model[3].parametrizations.weight.original[0, 0] = float("nan")
    controller.step()
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"finite weights, got NaN or infinity in 3\.weight"):
        controller.step()


def test_a_step_of_the_example_does_not_wait_for_the_device():
    from pathlib import Path

    from examples.cifar100 import Training, parse
    from examples.data import TrainBatches, load_data

    options = parse(["--dataset=digits", "--epochs=2", "--batch-size=64"])
    device = torch.device("cuda")
    data = load_data(options.dataset, Path("nowhere")).to(device)
    batches = TrainBatches(data, options.batch_size, options.epochs, options.seed)
    training = Training(options, batches, device)
    for step in range(3):  # the first steps choose algorithms and allocate buffers
        training.step(*batches[step])
    with no_waiting():
        for step in range(3, batches.steps_per_epoch):
            training.step(*batches[step])


def test_a_layer_that_starves_is_named_without_waiting_for_the_device():
    model = net().requires_grad_(False)
    with torch.no_grad():
        model[4].weight.mul_(1e-3)
        model[4].weight[0, :2] = 10.0
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=40)

    def train() -> None:
        with no_waiting():
            for _ in range(40):
                controller.step()
        torch.cuda.synchronize()
        controller.step()

    with pytest.warns(UserWarning, match=r"in 4\.weight \(2 survivors for 4 outputs\)") as caught:
        train()
    assert len(caught) == 1

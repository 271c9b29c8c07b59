"""Behaviour on a GPU; skipped without one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import feather_param
from feather_param.ops.kth import kth_magnitude
from tests import twins

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.Linear(16, 4)).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [0, 1, 5000, 9999, 10000])
def test_the_kth_magnitude_equals_that_of_the_cpu(dtype, k):
    weights = {"a": torch.randn(90, 100).to(dtype), "b": torch.zeros(1000, dtype=dtype)}
    on_gpu = {name: weight.cuda() for name, weight in weights.items()}
    assert torch.equal(kth_magnitude(on_gpu, k).cpu(), kth_magnitude(weights, k))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 5.0, float("inf")])
def test_a_zero_threshold_is_the_identity_for_subnormal_numbers_too(p):
    weight = torch.tensor([1e-40, -1e-45, 2e-38, 0.0, 3.0], device="cuda")
    for threshold in (torch.zeros((), device="cuda"), torch.zeros(())):
        assert torch.equal(feather_param.parametrizations.feather_threshold(weight, threshold, p=p), weight)


def test_a_step_never_waits_for_the_device():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=10)
    x, y = torch.randn(8, 3, 6, 6, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            controller.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    controller.desparsify()
    assert twins.count_zeros(twins.prunable(model)) == round(0.9 * 2328)


def test_a_step_and_a_forward_pass_run_in_a_cuda_graph():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=10, end_step=0)
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
    with torch.no_grad():
        for layer in (model[0], model[3], model[4]):
            layer.parametrizations.weight.original.mul_(2.0)
    before = controller.threshold.clone()
    graph.replay()
    assert torch.equal(controller.threshold, 2 * before)
    assert torch.allclose(out, model(x), atol=1e-5)


def test_nan_is_reported_at_a_later_step():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=10)
    with torch.no_grad():
        model[3].parametrizations.weight.original[0, 0] = float("nan")
    controller.step()
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"finite weights, got NaN or infinity in 3\.weight"):
        controller.step()


def test_a_step_of_the_example_never_waits_for_the_device():
    from pathlib import Path

    from examples.datasets import TrainBatches, load_data
    from examples.settings import Settings
    from examples.training import Training

    data = load_data("digits", Path("nowhere"))
    device = torch.device("cuda")
    data = replace(data, train=data.train.to(device), test=data.test.to(device))
    settings = Settings(dataset="digits", epochs=2, batch_size=64)
    batches = TrainBatches(data, settings.batch_size, settings.epochs, settings.seed)
    training = Training(settings, data, device, batches.steps_per_epoch)
    for step in range(3):  # the first steps choose algorithms and allocate buffers
        training.step(*batches[step])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3, batches.steps_per_epoch):
            training.step(*batches[step])
    finally:
        torch.cuda.set_sync_debug_mode("default")

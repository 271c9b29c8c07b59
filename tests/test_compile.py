"""Models under `torch.compile`: one graph for all steps, and the numbers of eager code."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import feather_param
from feather_param import allocations
from tests import twins
from tests.training import zeros_in


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 16),
        nn.Linear(16, 4),
    )


@pytest.mark.parametrize(
    ("final_rate", "theta", "allocation"),
    [
        (0.9, None, allocations.global_magnitude),
        (0.98, None, allocations.global_magnitude),
        (0.98, lambda rate: 1.5 - rate, allocations.global_magnitude),
        (0.9, None, allocations.erk),
    ],
    ids=["theta = 1", "theta = 0.5", "theta of the rate", "erk"],
)
@pytest.mark.parametrize("follows", [True, False], ids=["optimizer=", "step()"])
@pytest.mark.filterwarnings("ignore:nothing survives")
def test_one_graph_serves_all_steps_of_a_schedule(final_rate, theta, allocation, follows):
    torch._dynamo.reset()
    counters.clear()
    compiled_losses, eager_losses = [], []
    for compiled, losses in ((True, compiled_losses), (False, eager_losses)):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        controller = feather_param.sparsify(
            model,
            final_rate=final_rate,
            total_steps=12,
            start_step=2,
            theta=theta,
            allocation=allocation,
            optimizer=optimizer if follows else None,
        )
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        generator = torch.Generator().manual_seed(0)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(14):
                x, y = torch.randn(8, 3, 6, 6, generator=generator), torch.randint(4, (8,), generator=generator)
                loss = F.cross_entropy(forward(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if not follows:
                    controller.step()
                losses.append(loss.item())
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert compiled_losses == pytest.approx(eager_losses, rel=1e-5)


@pytest.mark.parametrize("wrapped", [False, True], ids=["the plain model", "the compiled model"])
def test_a_model_may_be_sparsified_after_it_was_compiled(wrapped):
    torch._dynamo.reset()
    model, x = net().eval(), torch.randn(4, 3, 6, 6)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    controller = feather_param.sparsify(compiled if wrapped else model, final_rate=0.9, total_steps=2)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), model(x))  # compiled and eager code compute different roots
        controller.step()
    feather_param.desparsify(model)
    assert compiled(x).equal(model(x))
    total = sum(weight.numel() for weight in twins.prunable(model))
    assert zeros_in(model) == round(0.9 * total)


def test_a_compiled_moving_average_prunes_its_own_weights():
    torch._dynamo.reset()
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=4, end_step=2)
    average = copy.deepcopy(model).eval()  # made before any weight is pruned
    compiled = torch.compile(average, backend="aot_eager")
    x = torch.randn(2, 3, 6, 6)
    for _ in range(4):
        controller.step()
        with torch.no_grad():
            for averaged, trained in zip(average.parameters(), model.parameters(), strict=True):
                trained.add_(torch.randn_like(trained), alpha=0.01)
                averaged.lerp_(trained, 0.5)
        assert torch.allclose(compiled(x), copy.deepcopy(average)(x), atol=1e-6)
    assert twins.count_zeros(average[i].weight for i in (0, 4, 5)) == controller.report().zeros


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo reads it of the input of a block
@pytest.mark.parametrize(
    "guards", [{}, {"max_rate_per_layer": 0.93, "min_nonzero_per_layer": 20}], ids=["no guards", "guards"]
)
def test_blocks_that_are_compiled_one_by_one_are_not_compiled_again(guards):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)))
    eager = copy.deepcopy(model)
    losses = []
    for compiled, network in ((True, model), (False, eager)):
        controller = feather_param.sparsify(network, final_rate=0.9, total_steps=8, **guards)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        if compiled:
            for block in network:
                block.compile(fullgraph=True, backend="aot_eager")
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
        own = []
        for step in range(8):
            if compiled and step == 1:
                graphs = counters["stats"]["unique_graphs"]
            optimizer.zero_grad()
            loss = network(x).square().mean()
            loss.backward()
            optimizer.step()
            controller.step()
            own.append(loss.item())
        losses.append(own)
    assert counters["stats"]["unique_graphs"] == graphs <= 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_freeze_compiles_one_more_graph():
    torch._dynamo.reset()
    counters.clear()
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    controller = feather_param.sparsify(model, final_rate=0.75, total_steps=4, end_step=0)
    forward = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 16)
    forward(x)
    controller.freeze()
    torch.testing.assert_close(forward(x), model(x))
    forward(x)
    assert counters["stats"]["unique_graphs"] == 2

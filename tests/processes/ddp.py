"""Checks of DistributedDataParallel. Each runs in several processes, see `launch.run`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import feather_param
from feather_param import patterns
from feather_param.allocations import global_magnitude
from tests import twins
from tests.processes.training import STEPS, ZEROS, batch, net, same_everywhere, sparsify, train, weights_of
from tests.training import zeros_in


def keeps_all_ranks_equal(
    rank: int, world: int, folder: Path, *, static_graph: bool, compiled: bool, allocation=global_magnitude
) -> None:
    model = net()
    controller = sparsify(model, allocation=allocation)
    wrapped: nn.Module = DistributedDataParallel(model, static_graph=static_graph)
    if compiled:
        wrapped = torch.compile(wrapped, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(wrapped, optimizer, controller, rank, world)
    assert same_everywhere(controller.threshold)
    for layer in (model[0], model[2], model[4]):
        assert same_everywhere(layer.weight.detach())
    feather_param.desparsify(model)
    assert zeros_in(model) == ZEROS
    assert all(same_everywhere(weight.detach()) for weight in twins.prunable(model))


def prunes_the_same_units_on_all_ranks(rank: int, world: int, folder: Path) -> None:
    for pattern, final_rate in ((patterns.blocks(1, 5), 0.9), (patterns.n_m(2, 5), 0.6)):
        model = net()
        controller = sparsify(model, final_rate=final_rate, pattern=pattern, include="2")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train(DistributedDataParallel(model), optimizer, controller, rank, world)
        assert same_everywhere(controller.masks()["2.weight"])
        assert controller.report().zeros == round(final_rate * 17 * 35) // pattern.size * pattern.size


def may_accumulate_gradients(rank: int, world: int, folder: Path) -> None:
    model = net()
    controller = sparsify(model)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(step, rank, world)
        with wrapped.no_sync():
            F.cross_entropy(wrapped(x), y).backward()
        F.cross_entropy(wrapped(x + 1), y).backward()
        optimizer.step()
        controller.step()
    assert same_everywhere(controller.threshold)
    state = feather_param.baked_state_dict(wrapped)
    assert all(name.startswith("module.") for name in state)
    assert twins.count_zeros(weights_of(state, "module.")) == ZEROS


def is_refused_by_sparsify(rank: int, world: int, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"got DistributedDataParallel at the root; the order is: sparsify\(model\)"):
        sparsify(DistributedDataParallel(net()))


def refuses_nan_on_all_ranks(rank: int, world: int, folder: Path) -> None:
    model = net()
    controller = sparsify(model)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch(0, rank, world)
    F.cross_entropy(wrapped(x * (float("nan") if rank == 1 else 1.0)), y).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"expected finite weights, got NaN or infinity in 0\.weight"):
        controller.step()

"""Checks of FSDP2. Each runs in several processes, see `launch.run`."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import feather_param
from feather_param import allocations, patterns, schedules
from tests import twins
from tests.processes.training import STEPS, ZEROS, batch, net, sparsify, train, weights_of
from tests.training import all_equal, same_state, zeros_in


def shard(model: nn.Module, **arguments) -> nn.Module:
    """Shard a layer by itself, and then the model with the other layers, as users do with blocks."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[2], **arguments)
    return fully_shard(model, **arguments)


def equals_one_process(rank: int, world: int, folder: Path, *, guards: dict, allocation=None) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = net()
    arguments = {**guards, "allocation": allocation or allocations.global_magnitude}
    controller = sparsify(model, **arguments)
    shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    alone = net()  # trained on all samples, without FSDP2
    reference = sparsify(alone, **arguments)
    other = torch.optim.AdamW(alone.parameters(), lr=0.01)
    for step in range(STEPS):
        train(model, optimizer, controller, rank, world, [step])
        train(alone, other, reference, 0, 1, [step])
        # Gradients differ by rounding, so the weights are copied. The thresholds must then be equal.
        with torch.no_grad():
            for copied, weight in zip(alone.parameters(), model.parameters(), strict=True):
                copied.copy_(weight.full_tensor())
        reference.refresh()
        assert torch.equal(controller.threshold, reference.threshold)
        for found, expected in zip(controller._shared.position.groups, reference._shared.position.groups, strict=True):
            assert (found.names, found.zeros) == (expected.names, expected.zeros)
            assert torch.equal(found.threshold, expected.threshold)
        with torch.no_grad():  # writes that only `refresh` follows
            for layer in (0, 2):
                for network in (model, alone):
                    network[layer].parametrizations.weight.original.mul_(1.5)
        for both in (controller, reference):
            both.refresh()
        assert torch.equal(controller.threshold, reference.threshold)
        for a, b in zip(controller.report().rows, reference.report().rows, strict=True):
            assert (a.name, a.total, a.zeros, a.survivor_fraction) == (b.name, b.total, b.zeros, b.survivor_fraction)
    x, _ = batch(0)
    torch.testing.assert_close(model(x), alone(x))
    state = feather_param.baked_state_dict(model)
    assert same_state(state, feather_param.baked_state_dict(alone))
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))  # rank 0 gets it
    assert rank or same_state(state, feather_param.baked_state_dict(full))
    plain = net(1)
    plain.load_state_dict(state)
    assert zeros_in(plain) == ZEROS
    with pytest.raises(ValueError, match=r"expected whole weights, got 0.weight sharded .*call baked_state_dict"):
        feather_param.desparsify(model)
    with pytest.raises(ValueError, match=r"expected whole weights, got 0.weight sharded"):
        controller.freeze()


def keeps_the_masks_of_a_frozen_model(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model = net()
    controller = sparsify(model, end_step=0)
    controller.freeze()
    masks = [weight != 0 for weight in twins.prunable(copy.deepcopy(model))]
    shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    train(model, optimizer, controller, rank, world)
    state = feather_param.baked_state_dict(model)
    assert all_equal([weight != 0 for weight in weights_of(state)], masks)
    resumed = net(1)
    other = sparsify(resumed, end_step=0)
    shard(resumed)
    other.step()
    set_model_state_dict(resumed, copy.deepcopy(get_model_state_dict(model)))
    other.load_state_dict(controller.state_dict())
    train(resumed, torch.optim.SGD(resumed.parameters(), lr=0.1, momentum=0.9), other, rank, world)
    state = feather_param.baked_state_dict(resumed)
    assert all_equal([weight != 0 for weight in weights_of(state)], masks)


def trains_in_mixed_precision(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = net()
    controller = sparsify(model)
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01), controller, rank, world)
    assert controller.threshold.dtype == torch.float32
    state = feather_param.baked_state_dict(model)
    assert twins.count_zeros(weights_of(state)) == ZEROS
    assert all(value.dtype == torch.float32 for value in state.values())


def may_be_moved_after_sharding(rank: int, world: int, folder: Path) -> None:
    """Lightning's ModelParallelStrategy calls `to` after fully_shard, and torch swaps the Parameters there."""
    model = net()
    controller = sparsify(model)
    shard(model)
    model.to("cpu")
    model.eval()
    with torch.no_grad():  # the first forward pass is no training
        model(batch(0, rank, world)[0])
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, controller, rank, world)
    threshold = controller.threshold
    model.to(torch.float64)
    controller.refresh()
    assert torch.equal(controller.threshold, threshold.double())
    assert sum(int((value == 0).sum()) for value in feather_param.baked_state_dict(model).values()) == ZEROS


def saves_a_checkpoint(rank: int, world: int, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    model = net()
    controller = sparsify(model)
    shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, controller, rank, world, range(3))
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "controller": controller.state_dict(),
    }
    dcp.save(state, checkpoint_id=folder / "checkpoint")
    baked = feather_param.baked_state_dict(model)
    if rank == 0:
        dcp_to_torch_save(folder / "checkpoint", folder / "one.pt")
        assert same_state(feather_param.baked_state_dict(torch.load(folder / "one.pt")["model"]), baked)
    train(
        model, optimizer, controller, 0, 1, range(3, STEPS)
    )  # all ranks get the same batch, so no sum depends on their number
    baked = feather_param.baked_state_dict(model)
    if rank == 0:
        torch.save([baked, controller.state_dict()], folder / "expected.pt")


def resumes_in_another_number_of_processes(rank: int, world: int, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    model = net(seed=7)
    controller = sparsify(model)
    shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "controller": controller.state_dict(),
    }
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert controller.step_count == 3  # from the state_dict of the model
    controller.refresh()
    threshold = controller.threshold
    controller.load_state_dict(state["controller"])
    assert (controller.step_count, controller.threshold) == (3, threshold)
    train(model, optimizer, controller, 0, 1, range(3, STEPS))
    baked, expected_state = torch.load(folder / "expected.pt")
    assert controller.state_dict() == expected_state
    resumed = feather_param.baked_state_dict(model)
    assert twins.count_zeros(weights_of(resumed)) == ZEROS
    for name, value in baked.items():  # the average of three equal gradients differs from that of two by rounding
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5)


def refuses_nan_on_all_ranks(rank: int, world: int, folder: Path) -> None:
    model = net()
    controller = sparsify(model)
    shard(model)
    weight = model[0].parametrizations.weight.original
    if rank == 1:
        with torch.no_grad():
            weight.to_local()[0, 0] = float("nan")
    where = "0.weight" if rank == 1 else "a part that another process holds"
    with pytest.raises(ValueError, match=f"expected finite weights, got NaN or infinity in {where}; the training"):
        controller.step()
    assert controller.step_count == 0


def is_refused_by_sparsify(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    with pytest.raises(
        ValueError, match=r"got FSDPSequential at the root; the order is: sparsify\(model\), then DDP or"
    ):
        sparsify(fully_shard(net()))
    model = nn.Sequential(net())
    fully_shard(model)
    with pytest.raises(ValueError, match=r"got 0.weight sharded over processes; the order is: sparsify\(model\)"):
        sparsify(model[0])


def refuses_an_allocation_that_sorts(rank: int, world: int, folder: Path) -> None:
    model = net()
    controller = sparsify(model, allocation=allocations.lamp)
    shard(model)
    with pytest.raises(ValueError, match=r"expected whole weights, got 0.weight sharded over processes: lamp sorts"):
        controller.step()
    assert controller.step_count == 0


def refuses_a_pattern(rank: int, world: int, folder: Path) -> None:
    model = net()
    controller = sparsify(model, pattern=patterns.blocks(1, 5), include="2")
    shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"expected whole weights with blocks\(1, 5\), got 2.weight sharded .*with DDP"
    ):
        train(model, optimizer, controller, rank, world)
    assert controller.step_count == 0


def refuses_weights_on_two_meshes(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = net()
    controller = sparsify(model)
    fully_shard(model[2], mesh=init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicas", "shards")))
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    with pytest.raises(ValueError, match=r"expected all the weights to be sharded over one mesh, got .*the same mesh"):
        controller.step()


def counts_a_replicated_weight_once(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    model, alone = net(), net()
    controller, reference = (sparsify(m, schedule=schedules.constant) for m in (model, alone))
    shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards")))
    controller.step()
    assert torch.equal(controller.threshold, reference.threshold)
    assert controller.report().zeros == ZEROS


def may_shard_a_part_of_the_model(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model, alone = net(), net()
    controller, reference = (sparsify(m, schedule=schedules.constant) for m in (model, alone))
    fully_shard(model[2])  # the other layers are whole on every process
    controller.step()
    assert torch.equal(controller.threshold, reference.threshold)
    assert same_state(feather_param.baked_state_dict(model), feather_param.baked_state_dict(alone))


def one_rank_ends(rank: int, world: int, folder: Path) -> None:
    model = net()
    controller = sparsify(model)
    shard(model)
    if rank == 1:
        os._exit(0)
    with pytest.raises(RuntimeError):
        controller.step()
    (folder / "raised").touch()
    os._exit(0)

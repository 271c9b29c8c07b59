"""Several processes on torch's own engines: DDP and FSDP2, over gloo on the CPU."""

from __future__ import annotations

import copy
import datetime
import gc
import os
import socket
import traceback
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import feather_param
from feather_param import schedules
from tests import twins

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

STEPS = 6


def net(seed: int = 0) -> nn.Sequential:
    """A network none of whose sizes is a multiple of 2 or 3, and one layer smaller than three rows."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(13, 35), nn.ReLU(), nn.Linear(35, 17), nn.ReLU(), nn.Linear(17, 2, bias=False))


N = 13 * 35 + 35 * 17 + 17 * 2


def batch(step: int, rank: int = 0, world: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(12, 13, generator=generator), torch.randint(2, (12,), generator=generator)
    return x.chunk(world)[rank], y.chunk(world)[rank]


def train(model, optimizer, controller, rank, world, steps=range(STEPS)) -> None:
    for step in steps:
        x, y = batch(step, rank, world)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        controller.step()


def sparse(model: nn.Module, **arguments) -> feather_param.Controller:
    return feather_param.sparsify(model, **{"final_rate": 0.9, "total_steps": STEPS, "end_step": 4, **arguments})


def same_everywhere(tensor: torch.Tensor) -> bool:
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return all(torch.equal(gathered[0], other) for other in gathered)


def run(works, world: int, folder: Path) -> str:
    """Run each ``work(rank, world, folder)`` in turn in so many processes; return what stopped them, if anything."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    context = mp.get_context("spawn")
    processes = [context.Process(target=_process, args=(works, rank, world, port, folder)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(400)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    errors = sorted(folder.glob(f"error_{world}_*"), key=lambda path: path.stat().st_mtime)
    if errors:
        return errors[0].read_text(encoding="utf-8")
    codes = [process.exitcode for process in processes]
    return f"ranks {hung} hang" if hung else "" if codes == [0] * world else f"exit codes {codes}"


def _process(works, rank: int, world: int, port: int, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch's own, of its own calls
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=120))
        for work in works:
            work(rank, world, folder)
            dist.barrier()
            (folder / f"{_name(work)}_{world}_{rank}").touch()
        gc.collect()  # wrapped models hold on to the group, whose threads must not outlive the interpreter
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error_{world}_{rank}").write_text(traceback.format_exc(), encoding="utf-8")
        raise


def _name(work) -> str:
    arguments = getattr(work, "keywords", {})
    return "-".join([getattr(work, "func", work).__name__, *(name for name, value in arguments.items() if value)])


def ddp(rank: int, world: int, folder: Path, *, static_graph: bool, compiled: bool) -> None:
    model = net()
    controller = sparse(model)
    wrapped: nn.Module = DistributedDataParallel(model, static_graph=static_graph)
    if compiled:
        wrapped = torch.compile(wrapped, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(wrapped, optimizer, controller, rank, world)
    assert same_everywhere(controller.threshold)
    for layer in (model[0], model[2], model[4]):
        assert same_everywhere(layer.weight.detach())
    feather_param.desparsify(model)
    assert twins.count_zeros(twins.prunable(model)) == round(0.9 * N)
    assert all(same_everywhere(weight.detach()) for weight in twins.prunable(model))


def ddp_no_sync(rank: int, world: int, folder: Path) -> None:
    model = net()
    controller = sparse(model)
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
    assert sum(int((state[f"module.{i}.weight"] == 0).sum()) for i in (0, 2, 4)) == round(0.9 * N)


def ddp_wrong_order(rank: int, world: int, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"got DistributedDataParallel at the root; the order is: sparsify\(model\)"):
        sparse(DistributedDataParallel(net()))


def ddp_nan(rank: int, world: int, folder: Path) -> None:
    model = net()
    controller = sparse(model)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = batch(0, rank, world)
    F.cross_entropy(wrapped(x * (float("nan") if rank == 1 else 1.0)), y).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"expected finite weights, got NaN or infinity in 0\.weight"):
        controller.step()


def sharded(model: nn.Module, **arguments) -> nn.Module:
    """Shard as one does: the blocks first, then the rest."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[2], **arguments)
    return fully_shard(model, **arguments)


def fsdp(rank: int, world: int, folder: Path, *, guards: dict) -> None:
    model = net()
    controller = sparse(model, **guards)
    sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    alone = net()  # one process that sees every batch whole
    judge = sparse(alone, **guards)
    reference = torch.optim.AdamW(alone.parameters(), lr=0.01)
    for step in range(STEPS):
        train(model, optimizer, controller, rank, world, [step])
        train(alone, reference, judge, 0, 1, [step])
        # Sums over batches differ by rounding, so the reference takes over the weights: the thresholds must agree.
        with torch.no_grad():
            for mine, theirs in zip(alone.parameters(), model.parameters(), strict=True):
                mine.copy_(theirs.full_tensor())
        judge.refresh()
        assert torch.equal(controller.threshold, judge.threshold)
        with torch.no_grad():  # weights that somebody else wrote
            for layer in (0, 2):
                for network in (model, alone):
                    network[layer].parametrizations.weight.original.mul_(1.5)
        for both in (controller, judge):
            both.refresh()
        assert torch.equal(controller.threshold, judge.threshold)
        for a, b in zip(controller.report().rows, judge.report().rows, strict=True):
            assert (a.name, a.total, a.zeros, a.survivor_share) == (b.name, b.total, b.zeros, b.survivor_share)
    x, _ = batch(0)
    torch.testing.assert_close(model(x), alone(x))
    state = feather_param.baked_state_dict(model)
    expected = feather_param.baked_state_dict(alone)
    assert list(state) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    plain = net(1)
    plain.load_state_dict(state)
    assert twins.count_zeros(twins.prunable(plain)) == round(0.9 * N)
    with pytest.raises(ValueError, match=r"expected whole weights, got 0.weight sharded .*call baked_state_dict"):
        feather_param.desparsify(model)
    with pytest.raises(ValueError, match=r"expected whole weights, got 0.weight sharded"):
        controller.freeze()


def fsdp_frozen(rank: int, world: int, folder: Path) -> None:
    model = net()
    controller = sparse(model, end_step=0)
    controller.freeze()
    before = [weight != 0 for weight in twins.prunable(copy.deepcopy(model))]
    sharded(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    train(model, optimizer, controller, rank, world)
    state = feather_param.baked_state_dict(model)
    assert all(torch.equal(state[f"{i}.weight"] != 0, mask) for i, mask in zip((0, 2, 4), before, strict=True))
    again = net(1)
    judge = sparse(again, end_step=0)
    sharded(again)
    judge.step()
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    set_model_state_dict(again, copy.deepcopy(get_model_state_dict(model)))
    judge.load_state_dict(controller.state_dict())
    train(again, torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9), judge, rank, world)
    state = feather_param.baked_state_dict(again)
    assert all(torch.equal(state[f"{i}.weight"] != 0, mask) for i, mask in zip((0, 2, 4), before, strict=True))


def fsdp_mixed(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = net()
    controller = sparse(model)
    sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01), controller, rank, world)
    assert controller.threshold.dtype == torch.float32
    state = feather_param.baked_state_dict(model)
    assert sum(int((state[f"{i}.weight"] == 0).sum()) for i in (0, 2, 4)) == round(0.9 * N)
    assert all(value.dtype == torch.float32 for value in state.values())


def fsdp_save(rank: int, world: int, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    model = net()
    controller = sparse(model)
    sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, controller, rank, world, range(3))
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "controller": controller.state_dict(),
    }
    dcp.save(state, checkpoint_id=folder / "checkpoint")
    train(model, optimizer, controller, 0, 1, range(3, STEPS))  # the same batch everywhere: no sum depends on the ranks
    baked = feather_param.baked_state_dict(model)
    if rank == 0:
        torch.save([baked, controller.state_dict()], folder / "expected.pt")


def fsdp_resume(rank: int, world: int, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    model = net(seed=7)
    controller = sparse(model)
    sharded(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "controller": controller.state_dict(),
    }
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert controller.step_count == 3  # the model's state tells
    controller.refresh()
    threshold = controller.threshold
    controller.load_state_dict(state["controller"])
    assert (controller.step_count, controller.threshold) == (3, threshold)
    train(model, optimizer, controller, 0, 1, range(3, STEPS))
    baked, expected_state = torch.load(folder / "expected.pt")
    assert controller.state_dict() == expected_state
    mine = feather_param.baked_state_dict(model)
    zeros = sum(int((mine[f"{i}.weight"] == 0).sum()) for i in (0, 2, 4))
    assert zeros == round(0.9 * N)
    for name, value in baked.items():  # gradients are averaged over another number of equal ones: rounding
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5)


def fsdp_nan(rank: int, world: int, folder: Path) -> None:
    model = net()
    controller = sparse(model)
    sharded(model)
    weight = model[0].parametrizations.weight.original
    if rank == 1:
        with torch.no_grad():
            weight.to_local()[0, 0] = float("nan")
    where = "0.weight" if rank == 1 else "a part that another process holds"
    with pytest.raises(ValueError, match=f"expected finite weights, got NaN or infinity in {where}; the training"):
        controller.step()
    assert controller.step_count == 0


def fsdp_wrong_order(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    with pytest.raises(
        ValueError, match=r"got FSDPSequential at the root; the order is: sparsify\(model\), then DDP or"
    ):
        sparse(fully_shard(net()))
    model = nn.Sequential(net())
    fully_shard(model)
    with pytest.raises(ValueError, match=r"got 0.weight sharded over processes; the order is: sparsify\(model\)"):
        sparse(model[0])


def fsdp_two_meshes(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = net()
    controller = sparse(model)
    fully_shard(model[2], mesh=init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicas", "shards")))
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    with pytest.raises(ValueError, match=r"expected all the weights to be sharded over one mesh, got .*the same mesh"):
        controller.step()


def hsdp(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    model, alone = net(), net()
    controller, judge = (sparse(m, schedule=schedules.constant) for m in (model, alone))
    sharded(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards")))
    controller.step()
    assert torch.equal(controller.threshold, judge.threshold)  # a weight that two hold is counted once
    assert controller.report().zeros == round(0.9 * N)


def fsdp_of_a_part(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model, alone = net(), net()
    controller, judge = (sparse(m, schedule=schedules.constant) for m in (model, alone))
    fully_shard(model[2])  # the other layers are whole on every process
    controller.step()
    assert torch.equal(controller.threshold, judge.threshold)
    state, expected = feather_param.baked_state_dict(model), feather_param.baked_state_dict(alone)
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def rank_dies(rank: int, world: int, folder: Path) -> None:
    model = net()
    controller = sparse(model)
    sharded(model)
    if rank == 1:
        os._exit(0)
    with pytest.raises(RuntimeError):
        controller.step()
    (folder / "told").touch()
    os._exit(0)


GUARDS = {"max_rate_per_layer": 0.93, "min_nonzero_per_layer": 9}
THRESHOLDS = [partial(fsdp, guards={}), partial(fsdp, guards=GUARDS)]
# Starting processes takes longer than most of what they do, so each group of them does several things.
GROUPS = {
    1: [ddp_wrong_order, fsdp_wrong_order, *THRESHOLDS],
    2: [
        partial(ddp, static_graph=False, compiled=False),
        partial(ddp, static_graph=True, compiled=False),
        partial(ddp, static_graph=False, compiled=True),
        ddp_no_sync,
        ddp_nan,
        *THRESHOLDS,
        fsdp_mixed,
        fsdp_frozen,
        fsdp_nan,
        fsdp_two_meshes,
        fsdp_of_a_part,
        fsdp_save,
    ],
    3: [*THRESHOLDS, fsdp_resume],  # from what the two processes saved
    4: [hsdp],
}


if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):  # FSDP2 of torch 2.6 does not run on a CPU
    GROUPS = {world: [work for work in works if "ddp" in _name(work)] for world, works in GROUPS.items()}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> tuple[Path, dict[int, str]]:
    folder = tmp_path_factory.mktemp("processes")
    return folder, {world: run(works, world, folder) for world, works in GROUPS.items()}


@pytest.mark.parametrize(
    ("world", "work"),
    [pytest.param(world, work, id=f"{_name(work)}-{world}") for world, works in GROUPS.items() for work in works],
)
def test_in_several_processes(outcomes, world, work):
    folder, stopped = outcomes
    done = [(folder / f"{_name(work)}_{world}_{rank}").exists() for rank in range(world)]
    assert all(done), stopped[world]


def test_a_rank_that_dies_ends_in_an_error(tmp_path):
    stopped = run([rank_dies], 2, tmp_path)
    assert not stopped
    assert (tmp_path / "told").exists()

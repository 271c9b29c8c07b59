"""Run checks in several processes, each of which takes part in torch.distributed over gloo."""

from __future__ import annotations

import datetime
import gc
import os
import socket
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Check = Callable[[int, int, Path], None]
"""A function of the rank, the number of processes, and a folder of all processes."""


def run(checks: Sequence[Check], world: int, folder: Path) -> str:
    """Run checks, one after the other, in a number of processes. Return the first error, or ""."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    context = mp.get_context("spawn")
    processes = [context.Process(target=_process, args=(checks, rank, world, port, folder)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(400)
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    errors = sorted(folder.glob(f"error_{world}_*"), key=lambda path: path.stat().st_mtime)
    if errors:
        return errors[0].read_text(encoding="utf-8")
    codes = [process.exitcode for process in processes]
    return f"ranks {hanging} hang" if hanging else "" if codes == [0] * world else f"exit codes {codes}"


def passed(check: Check, world: int, folder: Path) -> bool:
    """Return whether a check of `run` has passed in all processes."""
    return all(_mark(check, rank, world, folder).exists() for rank in range(world))


def name_of(check: Check) -> str:
    """Return the module and the name of a check, and its arguments that are set: functions by their own names."""
    function, arguments = getattr(check, "func", check), getattr(check, "keywords", {})
    module = function.__module__.rpartition(".")[2]
    given = [getattr(value, "__name__", name) for name, value in arguments.items() if value]
    return "-".join([f"{module}.{function.__name__}", *given])


def _mark(check: Check, rank: int, world: int, folder: Path) -> Path:
    return folder / f"{name_of(check)}_{world}_{rank}"


def _process(checks: Sequence[Check], rank: int, world: int, port: int, folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch warns of calls that it makes itself
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=120))
        for check in checks:
            check(rank, world, folder)
            dist.barrier()
            _mark(check, rank, world, folder).touch()
        gc.collect()  # wrapped models refer to the process group, whose threads must end before the interpreter does
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error_{world}_{rank}").write_text(traceback.format_exc(), encoding="utf-8")
        raise

"""What the training scripts have in common: options, how they begin and end, and the check of the model they save."""

from __future__ import annotations

import argparse
import errno
import math
import os
import signal
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

import feather_param
from examples.lock import BusyError, locked
from examples.processes import ALONE, Processes, joined
from examples.resumable import Parser, UserError, load_checkpoint, new_folder
from examples.run_log import RunLog
from examples.stop import Stopped, StopRequest
from feather_param.utils.signals import EndOnSignal, Signalled, last_words

ALLOCATIONS = ("global_magnitude", "uniform", "erk", "square_root", "lamp", "normalised")


class TrainingFailed(Exception):
    """The training diverged, or the saved model is not what was requested."""


def add_options(parser: Parser) -> None:
    """Add the options that all scripts have. Call this last: --resume lists the options that it leaves free."""
    option = parser.option
    option("--ptarget", 0.95, "final rate, the fraction of zeros; 0 trains dense", {"at least": 0, "below": 1})
    option("--p", 3.0, "exponent of the operator; use 1 for 98 %% zeros or more", {"above": 0})
    option("--allocation", "global_magnitude", "how many zeros each layer gets", choices=ALLOCATIONS)
    option("--sname", "run", "name of the run")
    help = "seed of the initialisation, the order of the images and their augmentation"
    option("--seed", 0, help, {"at least": 0, "below": 2**62})
    option("--no-cuda", False, "train on the CPU")
    help = "compute in bfloat16 where that is safe, with autocast (by default on a GPU only)"
    option("--amp", None, help, action=argparse.BooleanOptionalAction)
    option("--compile", False, "train through torch.compile, which first takes minutes on a CPU: for long runs")
    help = "continue the run of a folder runs/... or of its checkpoint.pt, with the options of the checkpoint; only "
    help += ", ".join("--" + name.replace("_", "-") for name in parser.free) + " may differ"
    option("--resume", None, help, metavar="CHECKPOINT")


def parse_options(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of a command line, and of the checkpoint if it resumes a run.

    Raises:
        UserError: an option is unknown, out of its range, or differs from the checkpoint to resume.
    """
    options = parser.parse_resumable(argv)
    if not options.sname or set(options.sname) & set("/\\\0"):
        raise UserError(f"expected --sname to be a file name without slashes, got {options.sname!r}")
    return options


def resume(training: Any, path: Path | None, program: str) -> dict[str, Any] | None:
    """Load the checkpoint of a run into a training, and return its content. A path of None is a new run.

    Raises:
        UserError: the file is not a checkpoint of this script, or one of another network or data set.
    """
    if path is None:
        return None
    checkpoint = load_checkpoint(path, program)
    try:
        training.load_state_dict(checkpoint["training"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]  # torch lists all tensors of a wrong network, on lines of their own
        raise UserError(f"expected a checkpoint of this network and data set, got another: {reason}") from error
    return checkpoint


@contextmanager
def run_log(training: Any, parent: Path, program: str, dataset: str, stop: StopRequest) -> Iterator[RunLog | None]:
    """Lock the folder of a run, continue from its checkpoint if it has one, and yield its log.

    The folder is that of the run to resume, or a new one in the parent. Call this in all processes. The first one holds
    the lock, and has the log; the others get None. In the block, a signal only requests a stop.

    Raises:
        UserError: another process trains the run, or `resume` does not take the checkpoint.
    """
    options, processes = training.options, training.processes
    with ExitStack() as stack:
        folder, busy = Path(), ""
        if processes.first:
            folder = options.resume.parent if options.resume else new_folder(parent, options.sname)
            try:
                stack.enter_context(locked(folder / RunLog.CHECKPOINT))
            except BusyError as error:
                busy = str(error)
        if processes.any(bool(busy)):
            raise UserError(busy)
        checkpoint, log = resume(training, options.resume, program), None
        if processes.first:
            log = RunLog(folder, options, training.controller, processes.count, checkpoint, program, dataset)
            stop.checkpoint = log.checkpoint
        stack.enter_context(stop)
        yield log


@contextmanager
def raised_as(kind: type[Exception], prefix: str) -> Iterator[None]:
    """Raise a ValueError of the block as another kind of error, with some words before its message."""
    try:
        yield
    except ValueError as error:
        raise kind(f"{prefix}: {error}") from error


def progress(
    step: int, loss: float, controller: feather_param.Controller | None, scheduler: LRScheduler
) -> dict[str, float]:
    """Return the step, the loss, and the current rate, threshold and learning rate.

    Raises:
        TrainingFailed: the loss is not finite.
    """
    if not math.isfinite(loss):
        raise TrainingFailed(f"at step {step}: the loss is {loss}; lower the learning rate")
    rate, threshold = (controller.rate, float(controller.threshold)) if controller else (0.0, 0.0)
    lr = float(scheduler.get_last_lr()[0])
    return {"step": step, "train_loss": loss, "rate": rate, "threshold": threshold, "lr": lr}


def measured(path: Path, plain: nn.Module, rate: float) -> dict[str, Any]:
    """Return the sizes of a file of weights, and the zeros of the network that has loaded it.

    Raises:
        TrainingFailed: there are not exactly ``round(rate * N)`` zeros among the N prunable weights. A rate of 0 is a
            dense network, whose zeros are only counted.
    """
    rows = feather_param.plan(plain, final_rate=0.5).rows  # the prunable weights, which are the same for any rate
    total = sum(row.total for row in rows)
    zeros = sum(int((plain.get_parameter(row.name) == 0).sum()) for row in rows)
    requested = round(rate * total)
    if requested and zeros != requested:
        raise TrainingFailed(f"expected {path} to hold exactly {requested:,} zeros, got {zeros:,}")
    content = path.read_bytes()
    return {
        "total": total,
        "zeros": zeros,
        "rate": zeros / total,
        "bytes": len(content),
        "bytes_compressed": len(zlib.compress(content, level=9)),
        "model": str(path),
    }


def reason(error: Exception) -> str:
    """Return the message of an error on one line. That of a full disk begins with the file, and says what to do."""
    if not isinstance(error, OSError) or error.filename is None or error.strerror is None:
        return str(error).strip().rpartition("\n")[2]  # an error of a worker process begins with its traceback
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{error.filename}: {error.strerror}" + ("; free some space" if full else "")


def _to_go_on(checkpoint: Path | None, processes: Processes) -> str:
    """Return how to resume a run, as the end of a sentence; nothing if there is no checkpoint."""
    if checkpoint is None or not checkpoint.is_file():
        return ""
    launcher = "python" if processes.count == 1 else f"torchrun --nproc-per-node={processes.count}"
    return f"; to go on: {launcher} {sys.argv[0]} --resume '{checkpoint}'"


def run(
    program: str,
    parse: Callable[[], argparse.Namespace],
    train: Callable[[argparse.Namespace, StopRequest, Processes], object],
) -> int:
    """Run a script and return its exit status: 0, 1 (failed), 2 (wrong use) or 128 + the signal that stopped it.

    Args:
        program: name of the script.
        parse: returns its options, among them `no_cuda`.
        train: trains, and returns something to print, or None.
    """
    first = os.environ.get("RANK", "0") == "0"
    processes, stop = ALONE, StopRequest()
    try:
        with EndOnSignal():
            options = parse()
            stop.checkpoint = options.resume
            with joined(cuda=torch.cuda.is_available() and not options.no_cuda) as processes:
                done = train(options, stop, processes)
    except UserError as error:
        if first:  # all processes have the same error
            print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except (TrainingFailed, OSError) as error:
        then = _to_go_on(stop.checkpoint, processes) if isinstance(error, OSError) else ""
        last_words(f"{program}: failed: {reason(error)}{then}")
        return 1
    except Stopped:
        if first:
            last_words(f"stopped{_to_go_on(stop.checkpoint, processes)}", sys.stdout)
        return 128 + (stop.signal or signal.SIGINT)
    except Signalled as error:
        if first:
            then = _to_go_on(stop.checkpoint, processes)
            lost = "the training since the last checkpoint is lost" if then else "no checkpoint was saved"
            last_words(f"{program}: {error}; {lost}{then}")
        return error.status
    if done is not None:
        print(done)
    return 0

"""What the training scripts have in common: how they begin and end, and the check of the model they save."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import feather_param
from examples.processes import ALONE, Processes, joined
from examples.resumable import Stopped, StopRequest, UserError


class TrainingFailed(Exception):
    """The training diverged, or the saved model is not what was requested."""


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
        with stop:
            options = parse()
            with joined(cuda=torch.cuda.is_available() and not options.no_cuda) as processes:
                done = train(options, stop, processes)
    except UserError as error:
        if first:  # all processes have the same error
            print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except (TrainingFailed, OSError) as error:
        print(f"{program}: failed: {error}", file=sys.stderr)
        return 1
    except Stopped as checkpoint:
        if first:
            launcher = "python" if processes.count == 1 else f"torchrun --nproc-per-node={processes.count}"
            print(f"stopped; to go on: {launcher} {sys.argv[0]} --resume '{checkpoint}'", flush=True)
        return 128 + (stop.signal or signal.SIGINT)
    if done is not None:
        print(done)
    return 0

"""The accuracies of runs that were stopped: `python -m benchmarks.stopped FOLDER --data-dir DATA`.

FOLDER holds the checkpoints that `benchmarks.gpu` or `benchmarks.cifar100_table --together` left. The networks are
evaluated as they are in the checkpoint, which is not changed. The table goes to the terminal, and with ``--write`` to
``stopped.json`` in the results.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.cifar100_run import Run
from benchmarks.gpu.files import join
from benchmarks.together import Together, load, unfinished
from examples.data import ImageData, load_data
from examples.resumable import UserError

__all__ = ["evaluate", "main"]


def evaluate(folder: Path, data: ImageData, device: torch.device) -> list[dict[str, Any]]:
    """Return the settings, the finished epochs, the test accuracy and the zeros of each stopped run of a folder."""
    rows = []
    for runs in unfinished(folder):
        group = Together(runs, data, device)
        load(group, folder)
        for network in group.networks:
            _, accuracy = network.evaluate(network.model)
            zeros = network.controller.report().zeros if network.controller else 0
            epochs = group.step_count // group.steps_per_epoch
            rows.append({"run": asdict(network.run), "epochs": epochs, "accuracy": accuracy, "zeros": zeros})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the checkpoints")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of CIFAR-100")
    parser.add_argument("--dataset", default="cifar100", choices=["cifar100", "digits"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="also write stopped.json to the results")
    arguments = parser.parse_args(argv)
    try:
        data = load_data(arguments.dataset, arguments.data_dir).to(arguments.device)
    except UserError as error:
        print(f"stopped: error: {error}", file=sys.stderr)
        return 2
    join(arguments.folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing survives|fewer survivors")
        found = evaluate(arguments.folder, data, torch.device(arguments.device))
    if not found:
        print(f"stopped: error: expected a checkpoint in {arguments.folder}, got none", file=sys.stderr)
        return 2
    rows = []
    for row in found:
        run = Run(**row["run"])
        epochs = f"{row['epochs']} of {run.epochs}"
        rows.append([run.network, run.method, f"{run.rate:.1%}", f"{row['zeros']:,}", epochs, f"{row['accuracy']:.2%}"])
    print(timing.show(["network", "method", "rate", "zeros", "epochs", "test accuracy"], rows))
    if arguments.write:
        content = {"evaluated on": timing.machine(), "runs": found}
        timing.write_whole(timing.RESULTS / "stopped.json", json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

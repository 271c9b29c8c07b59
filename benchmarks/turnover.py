"""The fraction of survivors that each epoch replaces, by method: `python -m benchmarks.turnover --data-dir DATA`.

The training is that of `benchmarks.cifar100_table --protocol short`, at one rate and with one seed. The masks are
recorded after each epoch (`feather_param.reports.History`). Once the rate is constant, each weight that enters replaces
another. If many weights are replaced, the network trains the weights that it keeps only for a short time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import timing
from benchmarks.cifar100_run import Run, RunTraining
from benchmarks.cifar100_table import PROTOCOLS
from benchmarks.methods import METHODS
from examples.data import load_data
from feather_param.reports.history import History


def train(method: str, rate: float, data_dir: Path) -> dict[str, Any]:
    """Train as in protocol ``short``. Return the replaced fraction of the survivors by epoch, and the accuracy."""
    torch.set_num_threads(1)
    protocol = PROTOCOLS["short"]
    data = load_data("cifar100", data_dir, protocol.train_size)
    run = Run("resnet20", protocol.width, method, rate, 0, protocol.epochs, protocol.train_size)
    training = RunTraining(run, data, torch.device("cpu"))
    assert training.controller is not None
    replaced = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing survives")
        history = History(training.controller)
        while training.step_count < len(training.batches):
            training.next_step()
            if training.step_count % training.batches.steps_per_epoch == 0:
                record = history.record()
                replaced.append(record.entered / record.survivors)
    return {"replaced": replaced, "accuracy": training.evaluate(training.model)[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder with CIFAR-100 (data)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["hard", "feather", "soft", "theta_vanishing"])
    parser.add_argument("--rate", type=float, default=0.995)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of parallel runs (one a core)")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        runs = {pool.submit(train, name, arguments.rate, arguments.data_dir): name for name in arguments.methods}
        for run in tqdm(as_completed(runs), total=len(runs), desc="runs"):
            figures[runs[run]] = run.result()
    rows = []
    for name in arguments.methods:
        settled = figures[name]["replaced"][PROTOCOLS["short"].epochs // 2 + 1 :]
        spread = [f"{100 * value:.1f}" for value in (settled[0], statistics.fmean(settled), settled[-1])]
        rows.append([name, METHODS[name].about, *spread, f"{100 * figures[name]['accuracy']:.2f}"])
    header = ["method", "what it is", "% replaced, first epoch at the rate", "mean", "last epoch", "test accuracy, %"]
    print(timing.show(header, rows))
    print(f"\nwritten to {timing.write('turnover', {'rate': arguments.rate, **figures})}")


if __name__ == "__main__":
    main()

"""How many survivors are replaced from epoch to epoch, by method: `python -m benchmarks.turnover --data-dir DATA`.

Trains as `benchmarks.cifar100_table --protocol short` does, at one rate and with one seed, and looks at the masks after
each epoch (`feather_param.reports.history`). Once the rate stands still, whoever enters takes the place of another: a
large turnover means that the network hardly ever trains the weights that it will keep.
"""

from __future__ import annotations

import argparse
import os
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import archs
from benchmarks import timing
from benchmarks.cifar100_table import PROTOCOLS
from benchmarks.methods import METHODS
from examples.datasets import TrainBatches, load_data
from examples.settings import Settings
from examples.training import Training
from feather_param.reports.history import History


def train(method: str, rate: float, data_dir: Path) -> dict[str, Any]:
    """Train ResNet-20 as in protocol ``short``; return what part of the survivors each epoch replaced, and accuracy."""
    torch.set_num_threads(1)
    protocol = PROTOCOLS["short"]
    data = load_data("cifar100", data_dir, protocol.train_size)
    batches = TrainBatches(data, batch_size=128, epochs=protocol.epochs, seed=0)
    training = Training(
        Settings(model="resnet20", epochs=protocol.epochs, ptarget=rate, seed=0, amp=True),
        data,
        torch.device("cpu"),
        batches.steps_per_epoch,
        build=partial(archs.resnet20, num_classes=data.classes, in_channels=data.channels, width=protocol.width),
        sparsify=lambda model, steps: METHODS[method].apply(model, rate, steps),
    )
    assert training.controller is not None
    replaced = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing survives")
        history = History(training.controller)
        for step in range(training.total_steps):
            training.step(*batches[step])
            if (step + 1) % batches.steps_per_epoch == 0:
                look = history.look()
                replaced.append(look.entered / look.survivors)
    return {"replaced": replaced, "accuracy": training.evaluate(data.test).accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder with CIFAR-100 (data)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["hard", "feather", "soft", "theta_vanishing"])
    parser.add_argument("--rate", type=float, default=0.995)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side (one a core)")
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

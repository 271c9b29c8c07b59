"""Replaced survivors and starving layers in each epoch: `python -m benchmarks.turnover --data-dir DATA`.

The training is that of `benchmarks.cifar100_table --protocol ten`, at one rate and with one seed. The masks are
recorded after each epoch (`feather_param.reports.History`). Two explanations of a low accuracy are compared:

* Turnover. Once the rate is constant, each weight that enters replaces another. If many weights are replaced, the
  network trains the weights that it keeps only for a short time.
* Starvation. A layer with less than one survivor for each output has outputs that do not depend on its input.
"""

from __future__ import annotations

import argparse
import os
import statistics
import warnings
from collections.abc import Mapping
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
from examples.images import ImageData
from feather_param.reports.history import History, Record

PROTOCOL = PROTOCOLS["ten"]


def train(run: Run, data: ImageData) -> dict[str, Any]:
    """Train a run on the CPU, and return the figures of each epoch and the test accuracy at the end.

    Returns:
        ``rate``, ``replaced`` (survivors that were pruned an epoch before, as a fraction of all survivors),
        ``smallest`` (survivors per output of the layer with the fewest) and ``starving`` (number of layers with less
        than one survivor per output), each a list with one value an epoch; ``accuracy``.
    """
    training = RunTraining(run, data, torch.device("cpu"))
    if training.controller is None:
        raise ValueError(f"expected a method that prunes, got {run.method!r}; choose one of {', '.join(METHODS)}")
    outputs = {row.name: row.shape[0] for row in training.controller.report().rows}
    figures: dict[str, Any] = {"rate": [], "replaced": [], "smallest": [], "starving": []}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing survives")
        history = History(training.controller)
        while training.step_count < len(training.batches):
            training.next_step()
            if training.step_count % training.batches.steps_per_epoch == 0:
                record = history.record()
                per_output = _per_output(record, outputs)
                figures["rate"].append(record.rate)
                figures["replaced"].append(record.entered / record.survivors)
                figures["smallest"].append(min(per_output))
                figures["starving"].append(sum(value < 1.0 for value in per_output))
    training.finish()
    return {**figures, "accuracy": training.evaluate(training.model)[1]}


def _per_output(record: Record, outputs: Mapping[str, int]) -> list[float]:
    return [layer.survivors / outputs[layer.name] for layer in record.layers]


def _train(run: Run, data_dir: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    return train(run, load_data(PROTOCOL.dataset, data_dir))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder with CIFAR-100 (data)")
    parser.add_argument("--network", choices=PROTOCOL.widths, default="mobilenet_v1")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["feather", "soft", "p_0.5"])
    parser.add_argument("--rate", type=float, default=0.995)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of parallel runs (one a core)")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    width = PROTOCOL.widths[arguments.network]
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        runs = {
            pool.submit(
                _train,
                Run(arguments.network, width, name, arguments.rate, 0, PROTOCOL.epochs, None),
                arguments.data_dir,
            ): name
            for name in arguments.methods
        }
        for run in tqdm(as_completed(runs), total=len(runs), desc="runs"):
            figures[runs[run]] = run.result()
    print(table({name: figures[name] for name in arguments.methods}))
    settings = {"network": arguments.network, "rate": arguments.rate}
    print(f"\nwritten to {timing.write('turnover', {**settings, **figures})}")


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the figures of each method as a table in Markdown.

    Epochs are those in which the rate is constant from the start to the end.
    """
    rows = []
    for name, figure in figures.items():
        final = figure["rate"].index(figure["rate"][-1])
        replaced = figure["replaced"][final + 1 :]
        spans = (replaced[0], statistics.fmean(replaced), replaced[-1])
        smallest = figure["smallest"]
        row = [name, METHODS[name].about, *(f"{100 * value:.1f}" for value in spans)]
        row += [f"{smallest[final]:.2f}", f"{smallest[-1]:.2f}", str(figure["starving"][-1])]
        rows.append([*row, f"{100 * figure['accuracy']:.2f}"])
    header = ["method", "what it is", "% replaced, first epoch at the rate", "mean", "last epoch"]
    header += ["survivors per output of the smallest layer, first epoch at the rate", "last epoch"]
    return timing.show([*header, "layers below 1", "test accuracy, %"], rows)


if __name__ == "__main__":
    main()

"""The paper's code beside the library: `python -m benchmarks.parity --data-dir DATA`.

All train MobileNetV1 of width 0.5 with protocol `ten` of `benchmarks.cifar100_table`: the same batches, recipe and
schedule, p = 3.

* ``library`` is the plain loop of the example with `feather_param.sparsify`.
* ``together`` trains the rates of a seed at once, with `benchmarks.together` and `torch.compile`.
* ``papers`` has the operator and the threshold of the paper's code, with a sort of all weights in each step.
* ``default_init`` is ``library`` with the default initialisation of torch's layers instead of that of `archs`.

Each run takes some minutes on one CPU core. The file ``parity.json`` is written after each run, and only the missing
runs are made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks import timing
from benchmarks.cifar100_run import Run, RunTraining
from benchmarks.cifar100_table import PROTOCOLS
from benchmarks.papers_code import PapersSparsity
from benchmarks.together import Together
from examples.data import ImageData, load_data
from examples.resumable import UserError
from feather_param import schedules

__all__ = ["CODES", "DefaultInit", "PapersTraining", "main"]

Result = dict[str, Any]
RATES = (0.9, 0.98, 0.995)
NETWORK = "mobilenet_v1"


class PapersTraining(RunTraining):
    """The training of a run with the operator and the threshold of the paper's code."""

    def sparsify(self) -> None:
        """Put the paper's operator on all weights."""
        self.papers = PapersSparsity(self.model, 0.5 if self.run.rate > 0.95 else 1.0)

    def next_step(self) -> None:
        """Train on the next batch, and compute the threshold from the new weights."""
        super().next_step()
        progress = min(1.0, self.step_count / (len(self.batches) // 2))
        self.papers.update(self.run.rate * schedules.cubic(progress))


class DefaultInit(RunTraining):
    """The training of a run with the default initialisation of torch's layers."""

    def network(self) -> nn.Module:
        """Return a new network. The global seed of PyTorch determines its initialisation."""
        network = super().network()
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.reset_parameters()
        return network


CODES = {
    "papers": "the paper's code",
    "library": "feather_param",
    "together": "feather_param, compiled, three networks at once",
    "default_init": "feather_param, torch's initialisation",
}
_CLASSES: dict[str, type[RunTraining]] = {"papers": PapersTraining, "library": RunTraining, "default_init": DefaultInit}


def train(code: str, runs: Sequence[Run], data: ImageData, device: torch.device) -> Iterator[tuple[Run, Result]]:
    """Train some runs of a seed with one of `CODES`, and yield each with its results."""
    machine, start = timing.machine(), time.monotonic()
    if code == "together":
        group = Together(runs, data, device, backend="inductor")
        for _ in tqdm(range(group.steps), desc=f"{code}, {len(runs)} runs", unit="step", leave=False):
            group.advance(1)
        group.finish()
        seconds = (time.monotonic() - start) / len(runs)
        for network in group.networks:
            yield network.run, _result(network, seconds, machine)
        return
    for run in runs:
        machine, start = timing.machine(), time.monotonic()
        training = _CLASSES[code](run, data, device)
        for _ in tqdm(range(len(training.batches)), desc=f"{code}, {run.name}", unit="step", leave=False):
            training.next_step()
        yield run, _result(training, time.monotonic() - start, machine)


def _result(training: RunTraining, seconds: float, machine: Mapping[str, Any]) -> Result:
    _, accuracy = training.evaluate(training.model)
    if isinstance(training, PapersTraining):
        zeros = training.papers.zeros()
    else:
        assert training.controller is not None
        zeros = training.controller.report().zeros
    seconds = round(seconds, 1)
    return {"run": asdict(training.run), "accuracy": accuracy, "zeros": zeros, "seconds": seconds, "machine": machine}


def main(argv: Sequence[str] | None = None) -> int:
    """Make the missing runs, print the table of all, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of CIFAR-100")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--codes", nargs="+", choices=CODES, default=list(CODES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=timing.RESULTS, help="folder of parity.json")
    arguments = parser.parse_args(argv)
    protocol, device = PROTOCOLS["ten"], torch.device(arguments.device)
    path: Path = arguments.results / "parity.json"
    found: dict[str, Result] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    runs = [
        Run(NETWORK, protocol.widths[NETWORK], "feather", rate, seed, protocol.epochs, protocol.train_size)
        for seed in range(arguments.seeds)
        for rate in RATES
    ]
    data: ImageData | None = None
    for code in arguments.codes:
        for seed in range(arguments.seeds):
            missing = [run for run in runs if run.seed == seed and f"{code}_{run.name}" not in found]
            if missing and data is None:
                try:
                    data = load_data(protocol.dataset, arguments.data_dir).to(device)
                except UserError as error:
                    print(f"parity: error: {error}", file=sys.stderr)
                    return 2
            for run, result in train(code, missing, data, device) if missing and data else ():
                found[f"{code}_{run.name}"] = result
                timing.write_whole(path, json.dumps(found, indent=1) + "\n")
    rows = []
    for code, name in CODES.items():
        results = [(run, found[key]) for run in runs if (key := f"{code}_{run.name}") in found]
        rows.append(
            [name, *(_cell([result["accuracy"] for run, result in results if run.rate == rate]) for rate in RATES)]
        )
    print(timing.show(["test accuracy, %", *(f"{rate:.1%} zeros" for rate in RATES)], rows))
    return 0


def _cell(accuracies: Sequence[float]) -> str:
    if not accuracies:
        return "not run"
    percent = [100 * accuracy for accuracy in accuracies]
    spread = f" ± {statistics.stdev(percent):.1f}" if len(percent) > 1 else ""
    return f"{statistics.fmean(percent):.1f}{spread} (n = {len(percent)})"


if __name__ == "__main__":
    raise SystemExit(main())

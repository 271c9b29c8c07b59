"""The paper's code beside the library: `python -m benchmarks.parity --data-dir DATA`.

Both train MobileNetV1 of width 0.5 with protocol `ten` of `benchmarks.cifar100_table`: same initialisation, batches,
recipe and schedule, p = 3. One uses the operator and the threshold of the paper's code, with a sort of all weights in
each step. The other uses `feather_param.sparsify`. Each run needs some minutes on one CPU core. The results are written
after each run, and only the missing runs are made. The results of the library are taken from the folder of the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from benchmarks import timing
from benchmarks.cifar100_run import Run, RunTraining
from benchmarks.cifar100_table import PROTOCOLS
from benchmarks.papers_code import PapersOperator, papers_threshold
from examples.data import load_data
from feather_param import schedules

__all__ = ["PapersTraining"]

RATES = (0.9, 0.98, 0.995)
NETWORK = "mobilenet_v1"


class _Papers(nn.Module):
    """The parametrization of the paper's code: all weights have one threshold."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = theta
        self.threshold = 0.0

    def forward(self, weight: Tensor) -> Tensor:
        return PapersOperator.apply(weight, self.threshold, self.theta)


class PapersTraining(RunTraining):
    """The training of a run with the operator and the threshold of the paper's code."""

    def sparsify(self) -> None:
        """Register the paper's operator on the weights of all convolutions and linear layers."""
        layers = [module for module in self.model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        self.operators = [_Papers(0.5 if self.run.rate > 0.95 else 1.0) for _ in layers]
        self.dense = [layer.weight for layer in layers]
        for layer, operator in zip(layers, self.operators, strict=True):
            parametrize.register_parametrization(layer, "weight", operator)

    def next_step(self) -> None:
        """Train on the next batch, and compute the threshold from the new weights."""
        super().next_step()
        progress = min(1.0, self.step_count / (len(self.batches) // 2))
        threshold = papers_threshold(self.dense, self.run.rate * schedules.cubic(progress))
        for operator in self.operators:
            operator.threshold = threshold

    def zeros(self) -> int:
        """Return the number of weights up to the threshold."""
        return sum(
            int((weight.abs() <= operator.threshold).sum())
            for weight, operator in zip(self.dense, self.operators, strict=True)
        )


def train(run: Run, data: Any, device: torch.device) -> dict[str, Any]:
    """Train with the paper's code, and return the results."""
    machine, start = timing.machine(), time.monotonic()
    training = PapersTraining(run, data, device)
    for _ in tqdm(range(len(training.batches)), desc=run.name, unit="step", leave=False):
        training.next_step()
    _, accuracy = training.evaluate(training.model)
    seconds = round(time.monotonic() - start, 1)
    return {"run": asdict(run), "accuracy": accuracy, "zeros": training.zeros(), "seconds": seconds, "machine": machine}


def main(argv: Sequence[str] | None = None) -> int:
    """Make the missing runs of the paper's code, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of CIFAR-100")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--results", type=Path, default=timing.RESULTS, help="parent of parity.json and of the folder ten"
    )
    arguments = parser.parse_args(argv)
    protocol, device = PROTOCOLS["ten"], torch.device(arguments.device)
    path = arguments.results / "parity.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    data = None
    runs = [
        Run(NETWORK, protocol.widths[NETWORK], "feather", rate, seed, protocol.epochs, None)
        for seed in range(arguments.seeds)
        for rate in RATES
    ]
    for run in runs:
        if run.name not in found:
            data = data or load_data(protocol.dataset, arguments.data_dir).to(device)
            found[run.name] = train(run, data, device)
            timing.write_whole(path, json.dumps(found, indent=1) + "\n")
    papers = {name: result["accuracy"] for name, result in found.items()}
    ours = {run.name: result["accuracy"] for run in runs if (result := run.done(arguments.results / "ten"))}
    rows = [
        [
            code,
            *(
                _cell([accuracies[run.name] for run in runs if run.rate == rate and run.name in accuracies])
                for rate in RATES
            ),
        ]
        for code, accuracies in (("the paper's code", papers), ("feather_param", ours))
    ]
    print(timing.show(["test accuracy, %", *(f"{rate:.1%} zeros" for rate in RATES)], rows))
    return 0


def _cell(accuracies: Sequence[float]) -> str:
    if len(accuracies) < 2:
        return "not run"
    percent = [100 * accuracy for accuracy in accuracies]
    return f"{statistics.fmean(percent):.1f} ± {statistics.stdev(percent):.1f} (n = {len(percent)})"


if __name__ == "__main__":
    raise SystemExit(main())

"""The log of a training run: TensorBoard events, checkpoint, results and picture."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard.summary import hparams

import feather_param
from examples.events import EventFile
from examples.resumable import save_checkpoint, save_picture, settings
from feather_param import Controller
from feather_param.files.atomic import atomic_write, remove_leftovers
from feather_param.reports.figures import draw
from feather_param.reports.history import History
from feather_param.reports.report import Report
from feather_param.reports.scalars import log_record


class RunLog:
    """The log of one run: TensorBoard events, a row for each epoch and the history of the masks, all by optimizer step.

    A resumed run continues the log in the same folder. TensorBoard drops the events after the checkpoint. Each file is
    written completely or not at all, except the events.

    Args:
        folder: folder of the run.
        options: its options.
        controller: its sparsity; None for a dense run.
        processes: number of processes that train together.
        resumed: the checkpoint of the run to resume; None for a new run.
        program: the script, for example ``cifar100.py``.
        dataset: name of the data set.

    Attributes:
        rows: one row for each finished epoch.
        history: one record for each finished epoch, and one of the start; None for a dense run.
        results: content of results.json, once the run is finished.
    """

    CHECKPOINT = "checkpoint.pt"

    def __init__(
        self,
        folder: Path,
        options: argparse.Namespace,
        controller: Controller | None,
        processes: int,
        resumed: Mapping[str, Any] | None,
        program: str,
        dataset: str,
    ) -> None:
        self.folder, self.dataset = folder, dataset
        self._program = program
        self.checkpoint = folder / self.CHECKPOINT
        self.rows: list[dict[str, float]] = []
        self.history = None if controller is None else History(controller)
        self.report: Report | None = None
        self.results: dict[str, Any] = {}
        self._settings = settings(options)
        self._start = time.monotonic()
        if resumed is None:
            self._events = EventFile(folder)
            self._add_settings(processes)
        else:
            remove_leftovers(folder)
            self._events = EventFile(folder, resumed["log"]["events"])
            self.rows = resumed["log"]["rows"]
            self._start -= resumed["log"]["seconds"]
            if self.history is not None:
                self.history.load_state_dict(resumed["log"]["history"])

    def _add_settings(self, processes: int) -> None:
        """Write config.json, and show the settings in TensorBoard."""
        versions = {module.__name__: module.__version__ for module in (torch, feather_param)}
        facts = {"command": sys.argv, "processes": processes, "python": platform.python_version(), **versions}
        self._write("config.json", {"settings": self._settings, **facts})
        shown = {name: v if isinstance(v, int | float | str) else str(v) for name, v in self._settings.items()}
        # The method `add_hparams` would write to another folder, which TensorBoard shows as another run.
        for summary in hparams(shown, {"acc/test": 0.0, "Loss/test": 0.0}):
            self._events.add_summary(summary)

    def add_step(self, row: Mapping[str, float]) -> None:
        """Log the rate, the threshold and the learning rate of a step."""
        for tag, name in (("prune_rate", "rate"), ("threshold", "threshold"), ("lr", "lr")):
            self._events.add_scalar(tag, row[name], int(row["step"]))

    def add_epoch(self, row: Mapping[str, float]) -> None:
        """Log the losses and the accuracy after an epoch, and record the masks."""
        self.rows.append({"epoch": len(self.rows) + 1, **row})
        names = {
            "Loss/train": "train_loss",
            "Loss/test": "test_loss",
            "acc/test": "accuracy",
            "acc/ema": "ema_accuracy",
        }
        for tag, name in names.items():
            if name in row:
                self._events.add_scalar(tag, row[name], int(row["step"]))
        if self.history is not None:
            log_record(self._events.add_scalar, self.history.record())

    def save_checkpoint(self, training: dict[str, Any]) -> None:
        """Save the settings, the state of the training and the log, for `load_checkpoint`."""
        log = {
            "rows": self.rows,
            "seconds": time.monotonic() - self._start,
            "history": None if self.history is None else self.history.state_dict(),
            "events": self._events.state_dict(),
        }
        save_checkpoint(self.checkpoint, self._program, {"settings": self._settings, "training": training, "log": log})

    def finish(self, results: Mapping[str, Any], report: Report | None, device: torch.device) -> None:
        """Write results.json, with a row for each layer and each epoch, and the picture summary.png."""
        last = self.rows[-1]
        self.report = report
        self.results = {
            **results,
            "train_loss": last["train_loss"],
            "threshold": last["threshold"],
            "seconds": round(time.monotonic() - self._start, 1),
            "device": f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type,
            "layers": [] if report is None else [{**asdict(row), "rate": row.rate} for row in report.rows],
            "epochs": self.rows,
        }
        self._write("results.json", self.results)
        name, model = self._settings["sname"], self._settings["model"]
        sparsity = "dense" if report is None else f"{results['rate']:.1%} zeros"
        title = f"{name}: {model} on {self.dataset}, {sparsity}, test accuracy {results['accuracy']:.2%}"
        names = {"test": "accuracy", "moving average": "ema_accuracy"}
        accuracy = {label: self.curve(name) for label, name in names.items() if name in last}
        figure = draw(report, history=self.history, accuracy=accuracy, title=title)
        save_picture(figure, self.folder / "summary.png")

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Return the optimizer step and one number, for example ``"accuracy"``, of each finished epoch."""
        return [(int(row["step"]), row[name]) for row in self.rows]

    def __str__(self) -> str:
        """Return the results of a finished run as text."""
        r = self.results
        lines = [f"test accuracy  {r['accuracy']:.2%}"]
        lines += [f"zeros          {r['zeros']:,} of {r['total']:,} prunable weights ({r['rate']:.3%})"]
        sizes = f"{r['bytes'] / 1e6:.2f} MB dense, {r['bytes_compressed'] / 1e6:.2f} MB compressed"
        lines += [f"file           {sizes}: {r['model']}", f"time           {r['seconds']:,.1f} s"]
        lines += [f"run folder     {self.folder}"]
        return "\n".join(lines if self.report is None else [str(self.report), "", *lines])

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        with atomic_write(self.folder / name) as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())

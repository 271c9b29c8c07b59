"""What a run leaves in its folder: TensorBoard events, config.json, results.json and the curves for the picture."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

import feather_param
from examples.settings import Settings
from examples.training import Baked, Score, Training, TrainingFailed
from feather_param.reports.report import Report
from feather_param.reports.tensorboard import add_report

__all__ = ["RunLog", "new_folder", "table"]

Row = dict[str, float]

_TRACE_POINTS = 500  # of a whole run: each reads the loss and the threshold off the device, which then waits


def new_folder(parent: Path, sname: str) -> Path:
    """Make the folder ``<datetime>_<sname>``; where that is taken, with a number behind."""
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{sname}"
    for count in range(1, 1000):
        folder = parent / (name if count == 1 else f"{name}-{count}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{parent / name} and its numbered siblings exist")


class RunLog:
    """The log of one run; everything is counted in optimizer steps.

    A resumed run goes on in the same folder; TensorBoard forgets what had been logged after its checkpoint.

    Args:
        folder: the run's folder.
        settings: its settings.
        total_steps: optimizer steps of the whole run.
        resumed: what `state_dict` returned, and the step at which that was.
        processes: number of processes that train together.

    Attributes:
        epochs: a row per finished epoch: epoch, step, train_loss, test_loss, accuracy, rate, threshold, lr.
        trace: a row of step, rate, threshold and lr, at most some hundred in a run.
        loss: mean loss of the running epoch, as of the last row of the trace.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        total_steps: int,
        resumed: tuple[dict[str, Any], int] | None = None,
        processes: int = 1,
    ) -> None:
        self.folder = folder
        state, step = resumed or ({}, -1)
        self.epochs: list[Row] = list(state.get("epochs", []))
        self.trace: list[Row] = list(state.get("trace", []))
        self.loss = math.nan
        self._loss_sum = torch.tensor(state.get("loss_sum", 0.0), dtype=torch.float64)
        self._loss_steps: int = state.get("loss_steps", 0)
        self._seconds: float = state.get("seconds", 0.0)
        self._since = time.monotonic()
        self._stride = max(1, total_steps // _TRACE_POINTS)
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if resumed else None)
        if not resumed:
            self._write_settings(settings, processes)

    @property
    def seconds(self) -> float:
        """Time spent on the run, over all its parts."""
        return self._seconds + time.monotonic() - self._since

    def add_step(self, training: Training, loss: Tensor) -> bool:
        """Note a step of the training; return whether it is one of the trace.

        Raises:
            TrainingFailed: the loss is no longer finite.
        """
        # The sum stays on the device; only the steps of the trace wait for it.
        self._loss_sum = self._loss_sum.to(loss.device) + loss
        self._loss_steps += 1
        if training.step_count % self._stride:
            return False
        self.loss = float(self._loss_sum) / self._loss_steps
        if not math.isfinite(self.loss):
            raise TrainingFailed(f"at step {training.step_count}: the loss is {self.loss}; lower the learning rate")
        row = _sparsity(training)
        self.trace.append({"step": training.step_count, **row})
        self._write(training.step_count, {"prune_rate": row["rate"], "threshold": row["threshold"], "lr": row["lr"]})
        return True

    def add_epoch(self, training: Training, score: Score) -> None:
        """Note the end of an epoch, with the score on the test split."""
        step = training.step_count
        train_loss = float(self._loss_sum) / self._loss_steps
        self._loss_sum, self._loss_steps = torch.zeros((), dtype=torch.float64), 0
        row = {
            "epoch": len(self.epochs) + 1,
            "step": step,
            "train_loss": train_loss,
            "test_loss": score.loss,
            "accuracy": score.accuracy,
            **_sparsity(training),
        }
        self.epochs.append(row)
        self._write(step, {"Loss/train": train_loss, "Loss/test": score.loss, "acc/test": score.accuracy})
        if training.controller is not None:
            add_report(self._writer, training.controller.report(), step)
        self._writer.flush()

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on."""
        return {
            "epochs": self.epochs,
            "trace": self.trace,
            "loss_sum": float(self._loss_sum),
            "loss_steps": self._loss_steps,
            "seconds": self.seconds,
        }

    def write_results(self, baked: Baked, report: Report | None, device: torch.device) -> float:
        """Write results.json: what was reached, layer by layer, and how it came about; return the seconds it took."""
        last = self.epochs[-1]
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
        seconds = round(self.seconds, 1)
        results = {
            "accuracy": baked.score.accuracy,
            "test_loss": baked.score.loss,
            "train_loss": last["train_loss"],
            "total": baked.total,
            "zeros": baked.zeros,
            "rate": baked.zeros / baked.total,
            "threshold": last["threshold"],
            "bytes": baked.size,
            "bytes_compressed": baked.compressed,
            "model": str(baked.path),
            "seconds": seconds,
            "device": f"{device.type} ({name})" if name else device.type,
            "layers": [] if report is None else [{**asdict(row), "rate": row.rate} for row in report.rows],
            "epochs": self.epochs,
        }
        self._write_json("results.json", results)
        return seconds

    def close(self) -> None:
        """Write the events that are still in memory."""
        self._writer.close()

    def _write(self, step: int, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def _write_settings(self, settings: Settings, processes: int) -> None:
        values = asdict(settings)
        config = {
            "settings": values,
            "command": sys.argv,
            "processes": processes,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "feather_param": feather_param.__version__,
        }
        self._write_json("config.json", config)
        known = {key: value if isinstance(value, int | float | str) else str(value) for key, value in values.items()}
        # `add_hparams` would write them to a folder of their own, which TensorBoard shows as another run.
        for summary in hparams(known, {"acc/test": 0.0, "Loss/test": 0.0}):
            self._writer._get_file_writer().add_summary(summary)

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sparsity(training: Training) -> Row:
    controller = training.controller
    return {
        "rate": 0.0 if controller is None else controller.rate,
        "threshold": 0.0 if controller is None else float(controller.threshold),
        "lr": training.lr,
    }


def _cpu_name() -> str:
    """Return the name of the processor, "" where nobody tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def table(baked: Baked, report: Report | None, seconds: float) -> str:
    """Return what a run has reached, to be read by people."""
    lines = [
        f"test accuracy  {baked.score.accuracy:.2%}",
        f"zeros          {baked.zeros:,} of {baked.total:,} prunable weights ({baked.zeros / baked.total:.3%})",
        f"file           {baked.size / 1e6:.2f} MB dense, {baked.compressed / 1e6:.2f} MB compressed: {baked.path}",
        f"time           {seconds:,.1f} s",
    ]
    return "\n".join(lines if report is None else [str(report), "", *lines])

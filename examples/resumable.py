"""What makes a training script safe to interrupt: options that a checkpoint keeps, and the log of a run."""

from __future__ import annotations

import argparse
import json
import operator
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

import feather_param
from feather_param import Controller
from feather_param.files.atomic import atomic_write
from feather_param.reports.figures import draw
from feather_param.reports.history import History
from feather_param.reports.report import Report
from feather_param.reports.scalars import log_record

_VERSION = 2
_KEYS = {"settings", "training", "log"}
_COMPARISONS = {"at least": operator.ge, "above": operator.gt, "below": operator.lt}


class UserError(Exception):
    """An error that the user can correct. The message is one sentence that says how."""


def save(content: Any, path: Path) -> None:
    """Save with ``torch.save``. The path holds either the old content or the new, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        torch.save(content, file)


def format_of(program: str) -> str:
    """Return the entry of a checkpoint that names the script which wrote it, for example ``cifar100.py``."""
    return f"feather_param/examples/{program.removesuffix('.py')}"


def load_checkpoint(path: Path, program: str) -> dict[str, Any]:
    """Return the content of a file that `RunLog.save_checkpoint` of a script wrote: settings, training and log.

    Raises:
        UserError: the file is missing, damaged or not a checkpoint of the script.
    """
    if not path.is_file():
        raise UserError(
            f"expected --resume to name a checkpoint file or the folder of a run, got {path}, which does not exist; "
            "a run that was killed before its first epoch ended has no checkpoint"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file may raise errors of pickle, of zip or of the operating system, and others.
    except Exception as error:
        raise UserError(
            f"expected --resume to name a checkpoint, got {path}, which is damaged or something else "
            f"({type(error).__name__})"
        ) from error
    if (
        not isinstance(checkpoint, dict)
        or checkpoint.get("format") != format_of(program)
        or not checkpoint.keys() >= _KEYS
    ):
        raise UserError(f"expected --resume to name a checkpoint of this script, got {path}, a file of another program")
    if checkpoint.get("version") != _VERSION:
        raise UserError(
            f"expected a checkpoint of version {_VERSION}, got version {checkpoint.get('version')} in {path}: "
            "resume it with the release that wrote it"
        )
    return checkpoint


class Parser(argparse.ArgumentParser):
    """A parser that raises a `UserError` for a wrong option, and reads the options of a run to resume.

    Args:
        free: names of the options that a resumed run may change.
        prog: name of the program.
        description: text of the help.
    """

    def __init__(self, free: Sequence[str], prog: str, description: str | None) -> None:
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.free = free
        self._ranges: dict[str, dict[str, float]] = {}

    def option(
        self, name: str, default: Any, help: str, range: dict[str, float] | None = None, **keywords: Any
    ) -> None:
        """Add an option. A default of False makes it a flag; the type of another default is that of the option.

        Its value has to be in the range, for example ``{"at least": 0, "below": 1}``.
        """
        if default is False:
            keywords = {"action": "store_true"}
        elif default is not None:
            keywords = {"type": type(default), "default": default, **keywords}
            help += " (%(default)s)"
        self.add_argument(name, help=help, **keywords)
        self._ranges[name] = range or {}

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_resumable(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse a command line. With --resume, the checkpoint gives the options that the command line leaves out.

        Raises:
            UserError: an option is unknown, out of its range, or differs from the checkpoint and is not free.
        """
        options = self.parse_args(argv)
        if options.resume is not None:
            path = Path(options.resume)
            path = path / "checkpoint.pt" if path.is_dir() else path
            saved = load_checkpoint(path, self.prog)["settings"]
            if saved.keys() != settings(options).keys():
                raise UserError("expected the settings of this script in the checkpoint, got those of another version")
            self.set_defaults(**saved)
            options = self.parse_args(argv)
            for name, value in settings(options).items():
                if name not in self.free and value != saved[name]:
                    raise UserError(
                        f"expected --{name.replace('_', '-')} to be {saved[name]} as in the run to resume, got "
                        f"{value}: leave the option out, or start a new run"
                    )
            options.resume = path
        for name, range in self._ranges.items():
            value = getattr(options, name.removeprefix("--").replace("-", "_"))
            if value is not None and not all(_COMPARISONS[word](value, bound) for word, bound in range.items()):
                expected = " and ".join(f"{word} {bound}" for word, bound in range.items())
                raise UserError(f"expected {name} to be {expected}, got {value}")
        return options


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return all options except --resume."""
    return {name: value for name, value in vars(options).items() if name != "resume"}


def new_folder(parent: Path, name: str) -> Path:
    """Make and return the folder ``<datetime>_<name>``. If it exists already, append a number."""
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{name}"
    for count in range(1, 1000):
        folder = parent / (name if count == 1 else f"{name}-{count}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{parent / name} and 998 folders with a number appended exist")


class RunLog:
    """The log of one run: TensorBoard events, a row for each epoch and the history of the masks, all by optimizer step.

    A resumed run continues the log in the same folder. TensorBoard drops the events after the checkpoint.

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
        self._format = format_of(program)
        self.checkpoint = folder / "checkpoint.pt"
        self.rows: list[dict[str, float]] = []
        self.history = None if controller is None else History(controller)
        self.report: Report | None = None
        self.results: dict[str, Any] = {}
        self._settings = settings(options)
        self._start = time.monotonic()
        if resumed is None:
            self._writer = SummaryWriter(str(folder))
            self._add_settings(processes)
        else:
            self._writer = SummaryWriter(str(folder), purge_step=resumed["training"]["step"] + 1)
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
            self._writer._get_file_writer().add_summary(summary)

    def add_step(self, row: Mapping[str, float]) -> None:
        """Log the rate, the threshold and the learning rate of a step."""
        for tag, name in (("prune_rate", "rate"), ("threshold", "threshold"), ("lr", "lr")):
            self._writer.add_scalar(tag, row[name], int(row["step"]))

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
                self._writer.add_scalar(tag, row[name], int(row["step"]))
        if self.history is not None:
            log_record(self._writer.add_scalar, self.history.record())
        self._writer.flush()

    def save_checkpoint(self, training: dict[str, Any]) -> None:
        """Save the settings, the state of the training and the log, for `load_checkpoint`."""
        history = None if self.history is None else self.history.state_dict()
        log = {"rows": self.rows, "seconds": time.monotonic() - self._start, "history": history}
        content = {"settings": self._settings, "training": training, "log": log}
        save({"format": self._format, "version": _VERSION, **content}, self.checkpoint)

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
        figure.savefig(self.folder / "summary.png")

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
        (self.folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Write the events that are still in memory."""
        self._writer.close()

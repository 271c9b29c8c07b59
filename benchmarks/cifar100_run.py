"""One training of the CIFAR-100 table: from its settings to a JSON file, through any number of interruptions."""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import archs
from benchmarks import timing
from benchmarks.methods import DENSE, METHODS
from examples.datasets import ImageData, TrainBatches
from examples.settings import Settings
from examples.training import Training, bake, build_model, save

__all__ = ["Run", "execute", "read"]

_SECONDS_BETWEEN_CHECKPOINTS = 60.0
_ENTRIES = {"run", "accuracy", "loss", "zeros", "total", "promised", "dead", "seconds", "machine"}  # of a run's file


@dataclass(frozen=True)
class Run:
    """The settings of one training.

    Attributes:
        network: a network of `archs`.
        width: of ResNet-20, the channels of its first stage; 0 for the network's own.
        method: a name of `METHODS`, or ``dense``.
        rate: the final rate; 0 for a dense network.
        seed: seed of the initialisation and of the data.
        epochs: number of epochs.
        train_size: number of training images, a fixed class-balanced subset; None for all.
    """

    network: str
    width: int
    method: str
    rate: float
    seed: int
    epochs: int
    train_size: int | None

    @property
    def name(self) -> str:
        """Name of the run's files, without a suffix."""
        return f"{self.network}_{self.method}_{self.rate}_seed{self.seed}"

    def done(self, folder: Path) -> dict[str, Any] | None:
        """Return what the run's JSON file says, if there is one.

        Raises:
            ValueError: the file is damaged, or of a run with other settings.
        """
        path = folder / f"{self.name}.json"
        if not path.is_file():
            return None
        content = read(path)
        if content["run"] != asdict(self):
            raise ValueError(f"expected the settings {asdict(self)} in {path}, got {content['run']}; move it away")
        return content


def read(path: Path) -> dict[str, Any]:
    """Return what a run's JSON file says.

    Raises:
        ValueError: it is damaged, or another one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected the JSON of a run in {path}, got a damaged file: {error}; move it away") from error
    if not isinstance(content, dict) or not content.keys() >= _ENTRIES or not isinstance(content["run"], dict):
        raise ValueError(f"expected the JSON of a run in {path}, got another one; move it away")
    return content


def execute(
    run: Run,
    data: ImageData,
    device: torch.device,
    folder: Path,
    advance: Callable[[int], None],
    stopped: Callable[[], bool],
) -> bool:
    """Train from the beginning or from the run's checkpoint, bake, prove the zeros, and write the JSON file.

    Args:
        run: the settings.
        data: the data set, on the device.
        device: where to train.
        folder: where the JSON file and the checkpoint lie.
        advance: told how many steps have been made, also those of the checkpoint.
        stopped: asked after every step whether to stop, at a checkpoint.

    Returns:
        Whether the run is done; not if it was stopped.

    Raises:
        TrainingFailed: the training diverged, or the zeros are not those promised.
    """
    batches = TrainBatches(data, batch_size=128, epochs=run.epochs, seed=run.seed)
    settings = Settings(model=run.network, epochs=run.epochs, ptarget=run.rate, seed=run.seed, amp=True)
    method = None if run.method == DENSE else METHODS[run.method]
    training = Training(
        settings,
        data,
        device,
        batches.steps_per_epoch,
        build=partial(_build, run, data),
        sparsify=lambda model, steps: method and method.apply(model, run.rate, steps),
    )
    checkpoint = folder / f"{run.name}.checkpoint.pt"
    machine = timing.machine()
    seconds, start = 0.0, time.monotonic()
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if state["run"] == asdict(run):
            training.load_state_dict(state["training"])
            seconds = state["seconds"]
            advance(training.step_count)
    saved = time.monotonic()

    def save_checkpoint() -> None:
        elapsed = seconds + time.monotonic() - start
        save({"run": asdict(run), "training": training.state_dict(), "seconds": elapsed}, checkpoint)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing survives")  # the JSON file names the dead layers
        while training.step_count < training.total_steps:
            training.step(*batches[training.step_count])
            advance(1)
            if method and method.freezes_after(training.step_count, training.total_steps) and training.controller:
                training.controller.freeze()
            if time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
                save_checkpoint()
                saved = time.monotonic()
            if stopped():
                save_checkpoint()
                return False
        with tempfile.TemporaryDirectory() as scratch:
            report = None if training.controller is None else training.controller.report()
            baked = bake(training, settings, data, Path(scratch) / "model.pt")
    content = {
        "run": asdict(run),
        "accuracy": baked.score.accuracy,
        "loss": baked.score.loss,
        "zeros": baked.zeros,
        "total": baked.total,
        "promised": round(run.rate * baked.total),
        "dead": [] if report is None else list(report.dead),
        "seconds": round(seconds + time.monotonic() - start, 1),
        "machine": machine,
    }
    timing.write_whole(folder / f"{run.name}.json", json.dumps(content, indent=1) + "\n")
    checkpoint.unlink(missing_ok=True)
    return True


def _build(run: Run, data: ImageData) -> nn.Module:
    if run.width:
        return archs.resnet20(num_classes=data.classes, in_channels=data.channels, width=run.width)
    return build_model(run.network, data)

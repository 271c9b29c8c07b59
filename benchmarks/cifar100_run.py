"""One training of the CIFAR-100 table, resumable, from its settings to a JSON file."""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import archs
import feather_param
from benchmarks import timing
from benchmarks.methods import DENSE, METHODS, mirror_step
from examples.cifar100 import NETWORKS, Training, bake, parse
from examples.data import ImageData, TrainBatches
from examples.lock import locked
from examples.resumable import save

__all__ = ["BATCH", "Run", "RunTraining", "build", "content", "execute", "read"]

BATCH = 128  # images in a batch
_SECONDS_BETWEEN_CHECKPOINTS = 60.0
# The keys of a JSON file. Files of 2026-11-27 and before do not have "layers".
_KEYS = {"run", "accuracy", "loss", "zeros", "total", "promised", "dead", "seconds", "machine"}


@dataclass(frozen=True)
class Run:
    """The settings of one training.

    Attributes:
        network: a network of `archs`.
        width: number of channels of the first stage of ResNet-20, or multiplier of the channels of MobileNetV1; 0 for
            the default of the network.
        method: a key of `METHODS`, or ``dense``.
        rate: the final rate; 0 for a dense network.
        seed: seed of the initialisation and of the data.
        epochs: number of epochs.
        train_size: number of training images, a fixed class-balanced subset; None for all.
    """

    network: str
    width: float
    method: str
    rate: float
    seed: int
    epochs: int
    train_size: int | None

    @property
    def name(self) -> str:
        """Name of the files of the run, without a suffix."""
        return f"{self.network}_{self.method}_{self.rate}_seed{self.seed}"

    def done(self, folder: Path) -> dict[str, Any] | None:
        """Return the content of the JSON file of the run, or None if it does not exist.

        Raises:
            ValueError: the file is damaged, or belongs to a run with other settings.
        """
        path = folder / f"{self.name}.json"
        if not path.is_file():
            return None
        content = read(path)
        if content["run"] != asdict(self):
            raise ValueError(f"expected the settings {asdict(self)} in {path}, got {content['run']}; move it away")
        return content


def read(path: Path) -> dict[str, Any]:
    """Return the content of the JSON file of a run.

    Raises:
        ValueError: the file is damaged, or not that of a run.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected the JSON of a run in {path}, got a damaged file: {error}; move it away") from error
    if not isinstance(content, dict) or not content.keys() >= _KEYS or not isinstance(content["run"], dict):
        raise ValueError(f"expected the JSON of a run in {path}, got another one; move it away")
    return content


def build(run: Run, classes: int, channels: int) -> nn.Module:
    """Return a new network of a run, for images with this number of channels and classes.

    The global seed of PyTorch determines its initialisation.

    Raises:
        ValueError: the run gives a width to a network that has no such argument.

    Example:
        >>> build(Run("mobilenet_v1", 0.5, "feather", 0.995, 0, 20, None), 10, 3).fc
        Linear(in_features=512, out_features=10, bias=True)
    """
    if not run.width:
        return NETWORKS[run.network](classes, channels)
    if run.network == "mobilenet_v1":
        return archs.mobilenet_v1(classes, channels, run.width)
    if run.network == "resnet20":
        return archs.resnet20(classes, channels, round(run.width))
    raise ValueError(f"expected width 0 for {run.network}, got {run.width}; only resnet20 and mobilenet_v1 have widths")


def content(
    run: Run, model: nn.Module, accuracy: float, loss: float, seconds: float, machine: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of the JSON file of a run.

    Args:
        run: the settings.
        model: the plain network after the training, with its zeros baked in.
        accuracy: its test accuracy, a fraction.
        loss: its mean loss on the test images.
        seconds: time of the training.
        machine: what `timing.machine` returned when the training started.
    """
    layers = []
    for row in feather_param.plan(model, final_rate=0.5).rows:  # the prunable weights are the same for any rate
        weight = model.get_parameter(row.name)
        survivors = int(torch.count_nonzero(weight))
        layers.append({"name": row.name, "size": row.total, "survivors": survivors, "outputs": len(weight)})
    total = sum(layer["size"] for layer in layers)
    return {
        "run": asdict(run),
        "accuracy": accuracy,
        "loss": loss,
        "zeros": total - sum(layer["survivors"] for layer in layers),
        "total": total,
        "promised": round(run.rate * total),
        "dead": [layer["name"] for layer in layers if not layer["survivors"]],
        "layers": layers,
        "seconds": round(seconds, 1),
        "machine": dict(machine),
    }


class RunTraining(Training):
    """The training of a run: that of the example, with another method or width.

    Args:
        run: the settings.
        data: the data set, on the device.
        device: where to train.
        least: smallest number of images in a batch; a smaller last batch of an epoch is left out.

    Attributes:
        method: the method of the run; None for a dense network.
        average: the moving average of the network, where the method has one; else None.
    """

    def __init__(self, run: Run, data: ImageData, device: torch.device, least: int = BATCH // 8) -> None:
        self.run = run
        self.method = None if run.method == DENSE else METHODS[run.method]
        # Depthwise convolutions in bfloat16 are slower than in float32 on a CPU.
        amp = "--no-amp" if device.type == "cpu" and run.network == "mobilenet_v1" else "--amp"
        options = f"--model={run.network} --epochs={run.epochs} --ptarget={run.rate} --seed={run.seed} {amp}"
        batches = TrainBatches(data, BATCH, run.epochs, run.seed, least)
        super().__init__(parse(options.split()), batches, device)
        decay = self.method and self.method.average
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None
        if self.method and self.method.mirror:
            self.optimizer.register_step_post_hook(lambda optimizer, *_: mirror_step(optimizer))

    def network(self) -> nn.Module:
        """Return a new network of the width of the run."""
        data = self.batches.data
        return build(self.run, data.classes, data.channels)

    def sparsify(self) -> feather_param.Controller | None:
        """Sparsify the model with the method of the run."""
        return self.method and self.method.apply(self.model, self.run.rate, len(self.batches))

    def next_step(self) -> None:
        """Train on the next batch, freeze the mask where the method does, and update the moving average."""
        self.step(*self.batches[self.step_count])
        if self.method and self.controller and self.step_count == self.method.freeze_step(len(self.batches)):
            self.controller.freeze()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def finish(self) -> None:
        """Replace the network by its moving average, where the method has one. The training is over then."""
        if self.average is not None:
            self.model = self.average.module

    def _parts(self) -> dict[str, Any]:
        return super()._parts() | ({} if self.average is None else {"average": self.average})


def execute(
    run: Run,
    data: ImageData,
    device: torch.device,
    folder: Path,
    advance: Callable[[int], None],
    stopped: Callable[[], bool],
) -> bool:
    """Train from the start or from the checkpoint of the run, bake, check the zeros and write the JSON file.

    A run that another process has finished is not made again.

    Args:
        run: the settings.
        data: the data set, on the device.
        device: where to train.
        folder: folder of the JSON file and the checkpoint.
        advance: called with the number of steps made, including those of the checkpoint.
        stopped: called after each step. If it returns True, the run saves a checkpoint and stops.

    Returns:
        True if the run is finished, False if it was stopped.

    Raises:
        BusyError: another process makes the run.
        TrainingFailed: the training diverged, or the number of zeros is not exact.
    """
    checkpoint = folder / f"{run.name}.checkpoint.pt"
    with locked(checkpoint):
        if run.done(folder) is not None:  # by another process in the meantime
            return True
        training = RunTraining(run, data, device)
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
            warnings.filterwarnings("ignore", "nothing survives")  # the JSON file lists the dead layers
            while training.step_count < len(training.batches):
                training.next_step()
                advance(1)
                if time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
                    save_checkpoint()
                    saved = time.monotonic()
                if stopped():
                    save_checkpoint()
                    return False
            with tempfile.TemporaryDirectory() as scratch:
                training.finish()
                baked = bake(training, Path(scratch) / "model.pt")
        elapsed = seconds + time.monotonic() - start
        result = content(run, training.model, baked["accuracy"], baked["test_loss"], elapsed, machine)
        timing.write_whole(folder / f"{run.name}.json", json.dumps(result, indent=1) + "\n")
        checkpoint.unlink(missing_ok=True)
        return True

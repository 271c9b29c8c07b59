"""The training itself: one object that holds all of its state, and the proof of what it leaves."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import archs
import feather_param
from examples.datasets import ImageData, Split
from examples.processes import ALONE, Processes
from examples.settings import Settings, UserError
from feather_param.files.atomic import replacing

__all__ = [
    "Baked",
    "Score",
    "Training",
    "TrainingFailed",
    "bake",
    "build_model",
    "evaluate",
    "placed",
    "prunable",
    "save",
]

_MOMENTUM = 0.9
_CLIP = 3.0  # largest norm of the gradient of all parameters together
_EVAL_BATCH = 500


class TrainingFailed(Exception):
    """The training diverged, or did not leave what was promised."""


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy, and the fraction of images classified right."""

    loss: float
    accuracy: float


def build_model(name: str, data: ImageData) -> nn.Module:
    """Build a network for a data set; the initialisation takes PyTorch's global seed."""
    builders: dict[str, Callable[..., nn.Module]] = {
        "resnet20": archs.resnet20,
        "mobilenet_v1": archs.mobilenet_v1,
        "densenet": archs.densenet,
    }
    return builders[name](num_classes=data.classes, in_channels=data.channels)


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a model on a device, channels last in memory.

    That measures faster, on a CPU by a tenth (resnet20) to a half (densenet).
    """
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _sparsify(model: nn.Module, rate: float, total_steps: int, start_step: int) -> feather_param.Controller | None:
    if rate == 0:
        return None
    try:
        return feather_param.sparsify(model, final_rate=rate, total_steps=total_steps, start_step=start_step)
    except ValueError as error:
        raise UserError(f"--ptarget {rate} cannot be reached: {error}") from error


class Training:
    """A model on its way, with everything that moves it: optimizer, learning rate, sparsity.

    Args:
        settings: the run's settings.
        data: the data set.
        device: where to train.
        steps_per_epoch: number of optimizer steps in an epoch.
        processes: those that train together; each one learns from its part of every batch.
        build: makes the network, plain; `build_model` unless given.
        sparsify: makes a network sparse over so many steps, None if it stays dense; as the settings say unless given.

    Raises:
        UserError: the network cannot be as sparse as the settings ask.

    Attributes:
        model: the network.
        controller: its sparsity; None where the run is dense.
        step_count: optimizer steps made.
        total_steps: optimizer steps of the whole run.
    """

    def __init__(
        self,
        settings: Settings,
        data: ImageData,
        device: torch.device,
        steps_per_epoch: int,
        processes: Processes = ALONE,
        build: Callable[[], nn.Module] | None = None,
        sparsify: Callable[[nn.Module, int], feather_param.Controller | None] | None = None,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.build = build or (lambda: build_model(settings.model, data))
        self.device = device
        self.processes = processes
        self.amp = device.type == "cuda" if settings.amp is None else settings.amp
        self.normalise = data.normalise
        self.step_count = 0
        self.total_steps = settings.epochs * steps_per_epoch
        self.model = placed(self.build(), device)
        start = settings.t1 * steps_per_epoch
        sparsify = sparsify or (lambda model, total_steps: _sparsify(model, settings.ptarget, total_steps, start))
        self.controller = sparsify(self.model, self.total_steps)
        # Weights are matrices or kernels; biases and batch norm are vectors, and get no weight decay.
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.wd},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=_MOMENTUM)
        self.scheduler = CosineAnnealingLR(self.optimizer, T_max=self.total_steps)
        wrapped = processes.wrap(self.model)
        self._forward: Callable[[Tensor], Tensor] = torch.compile(wrapped) if settings.compile else wrapped

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.scheduler.get_last_lr()[0])

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Learn from one batch and return its loss, a 0-dim tensor; with several processes, that of this one's part.

        Raises:
            TrainingFailed: the weights are no longer finite.
        """
        self.model.train()
        total = len(images)
        images, labels = self.processes.part(images), self.processes.part(labels)
        images = self.normalise(images.to(self.device, non_blocking=True))
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            loss = F.cross_entropy(self._forward(images), labels.to(self.device, non_blocking=True))
        self.optimizer.zero_grad()
        # The processes' gradients are averaged: that is the mean over the batch where the parts count by their size.
        (loss * (len(images) * self.processes.count / total)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        self.optimizer.step()
        if self.controller is not None:
            try:
                self.controller.step()
            except ValueError as error:
                raise TrainingFailed(f"at step {self.step_count + 1}: {error}") from error
        self.scheduler.step()
        self.step_count += 1
        return loss.detach()

    def evaluate(self, split: Split) -> Score:
        """Return the score of the model as it would be deployed now."""
        return evaluate(self.model, split, self.normalise, self.device, self.amp)

    def agrees(self) -> bool:
        """Return whether all processes would bake the same zeros."""
        state = feather_param.baked_state_dict(self.model) if self.controller else self.model.state_dict()
        return self.processes.same(torch.cat([value.flatten() == 0 for value in state.values()]).to(torch.uint8))

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on as if nothing had happened."""
        return {
            "step": self.step_count,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "controller": None if self.controller is None else self.controller.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])
        self.step_count = state["step"]


def evaluate(
    model: nn.Module, split: Split, normalise: Callable[[Tensor], Tensor], device: torch.device, amp: bool
) -> Score:
    """Return the score of a model on a split, the same for the same weights whenever it is asked."""
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    right = torch.zeros((), dtype=torch.int64, device=device)
    # Algorithms picked by a benchmark may differ from call to call, and with them the last bits.
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with torch.inference_mode(), exact, torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
        for images, labels in zip(split.images.split(_EVAL_BATCH), split.labels.split(_EVAL_BATCH), strict=True):
            labels = labels.to(device)
            logits = model(normalise(images.to(device)))
            loss += F.cross_entropy(logits, labels, reduction="sum")
            right += (logits.argmax(dim=1) == labels).sum()
    return Score(float(loss) / len(split), int(right) / len(split))


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a plain model's convolutions and linear layers, by name."""
    return {
        f"{name}.weight": module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


@dataclass(frozen=True)
class Baked:
    """What a training leaves: a file of plain weights, measured after reading it back.

    Attributes:
        path: the file, a ``state_dict`` for the plain network.
        score: the score of the network read from it.
        total: number of prunable weights.
        zeros: number of zeros among them.
        size: bytes of the file.
        compressed: bytes of the file after zlib at its strongest.
    """

    path: Path
    score: Score
    total: int
    zeros: int
    size: int
    compressed: int


def bake(training: Training, settings: Settings, data: ImageData, path: Path) -> Baked:
    """Bake the zeros into the model, save it, and prove that the file is what was promised.

    Args:
        training: a training at its end; its model is plain afterwards.
        settings: its settings.
        data: its data set.
        path: the file to write.

    Raises:
        TrainingFailed: the file read back gives another accuracy, or another number of zeros.
    """
    expected = training.evaluate(data.test)
    if training.controller is not None:
        feather_param.desparsify(training.model)
    save(training.model.state_dict(), path)
    plain = placed(training.build(), training.device)
    plain.load_state_dict(torch.load(path, map_location=training.device, weights_only=True))
    score = evaluate(plain, data.test, data.normalise, training.device, training.amp)
    weights = prunable(plain).values()
    total = sum(weight.numel() for weight in weights)
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    if score.accuracy != expected.accuracy:
        raise TrainingFailed(
            f"expected {path} to have the test accuracy of the model in training, {expected.accuracy:.4%}, "
            f"got {score.accuracy:.4%}"
        )
    promised = round(settings.ptarget * total)
    if settings.ptarget and zeros != promised:
        raise TrainingFailed(f"expected {path} to hold exactly {promised:,} zeros, got {zeros:,}")
    content = path.read_bytes()
    return Baked(path, score, total, zeros, len(content), len(zlib.compress(content, level=9)))


def save(content: Any, path: Path) -> None:
    """Save with ``torch.save`` so that the path holds the old content or the new, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        torch.save(content, file)

"""A LightningModule on digits, and Trainers without output."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

STEPS = 4
"""Batches in an epoch."""
RATE = 0.75
WEIGHTS = 64 * 16 + 16 * 10
ZEROS = round(RATE * WEIGHTS)

_DIGITS = load_digits()
_IMAGES = torch.tensor(_DIGITS.data[: 8 * STEPS], dtype=torch.float32) / 16
_LABELS = torch.tensor(_DIGITS.target[: 8 * STEPS])


class Resumable(DataLoader):
    """A loader that Lightning can resume within an epoch."""

    first = done = 0

    def __iter__(self) -> Iterator[Any]:
        first, self.first = self.first, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= first:
                self.done = index + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.first = state_dict["done"] % len(self)


def batches(**options: Any) -> DataLoader:
    return Resumable(TensorDataset(_IMAGES, _LABELS), **{"batch_size": 8, **options})


class Digits(LightningModule):
    """A small classifier, with the same weights each time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2)}


def quiet(tmp_path: Path, *callbacks: Callback, epochs: int = 4, **options: Any) -> Trainer:
    """Return a Trainer on the CPU that writes nothing but checkpoints."""
    bare = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    if any(isinstance(each, Checkpoint) for each in callbacks):
        del bare["enable_checkpointing"]
    everything = {"accelerator": "cpu", "devices": 1, "default_root_dir": tmp_path, **bare, **options}
    if "max_steps" not in options:
        everything["max_epochs"] = epochs
    return Trainer(callbacks=[*callbacks], **everything)


def zeros(module: nn.Module) -> int:
    return sum(int((each == 0).sum()) for name, each in module.state_dict().items() if each.dim() > 1)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def fit(tmp_path: Path, *callbacks: Callback, module: Any = None, ckpt_path: Any = None, **options: Any) -> Any:
    """Return a module that was trained, and its Trainer."""
    module = module or Digits()
    trainer = quiet(tmp_path, *callbacks, **options)
    trainer.fit(module, batches(), batches(), ckpt_path=ckpt_path)
    return module, trainer


# Warnings of Lightning: the first with torch 2.14, the others because the data are small.
QUIET = (
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
    "ignore:The .*dataloader.* does not have many workers",
    "ignore:The number of training batches",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:You are trying to `self.log",
    "ignore:Checkpoint directory .* exists and is not empty",
)

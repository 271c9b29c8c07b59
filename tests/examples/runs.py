"""A short run of the training script, and its files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

RATE = 0.8
TINY = f"--dataset digits --train-size 100 --batch-size 32 --epochs 4 --ptarget {RATE} --no-cuda".split()
STEPS = 16


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def baked(folder: Path) -> dict[str, Tensor]:
    return torch.load(only(folder, "models/*.pt"), weights_only=True)


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(a[key].equal(b[key]) for key in a)

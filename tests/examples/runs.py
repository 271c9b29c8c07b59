"""A short run of the training script, and its files."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from feather_param import load_sparse

RATE = 0.8
TINY = f"--dataset digits --train-size 100 --batch-size 32 --epochs 4 --ptarget {RATE} --no-cuda".split()
STEPS = 16


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def baked(folder: Path) -> dict[str, Tensor]:
    return torch.load(only(folder, "models/*.pt"), weights_only=True)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and values of each scalar as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def whole_and_resumed(
    script: ModuleType, file: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Tensor]]:
    """Run a script, and run it again with a stop after two epochs. Return the sparse file of each."""
    files = []
    for name, runs in (("whole", [[]]), ("resumed", [["--epochs", "2"], []])):
        (folder / name).mkdir()
        monkeypatch.chdir(folder / name)
        for arguments in runs:
            script.main(arguments)
        files.append(load_sparse(file))
    return files

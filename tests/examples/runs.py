"""A short run of the training script, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


def content(folder: Path, run: Path) -> dict[str, Any]:
    """Return the content of the files of a run, without times and names."""
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    del checkpoint["log"]["seconds"], checkpoint["settings"]["sname"]
    results = json.loads((run / "results.json").read_text())
    for part in (results, results.get("ema", {})):
        part.pop("seconds", None)
        part.pop("model", None)
    # The name of a file of weights begins with that of the run.
    models = {path.name.removeprefix(run.name): torch.load(path) for path in sorted((folder / "models").iterdir())}
    return {"checkpoint": checkpoint, "results": results, "models": models, "events": scalars(run)}


def equal(first: Any, second: Any) -> bool:
    """Return whether two values are equal bit for bit: tensors, or dictionaries and sequences of them."""
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(equal(value, second[key]) for key, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return type(first) is type(second) and first == second


class Picture:
    """A picture of a run that takes no time."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def savefig(self, file: Any, **_: object) -> None:
        file.write(b"picture")


def tiny(num_classes: int, in_channels: int) -> nn.Module:
    """Return a fast network for `cifar100.py`."""
    conv = [nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4)]
    return nn.Sequential(*conv, nn.Flatten(), nn.Linear(128, num_classes))


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

"""A fake ImageNet of 64 pictures, short runs of `imagenet.py` on it, and checks that run in two processes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models._api import register_model

import feather_param
from examples import imagenet, sharding
from examples.imagenet import Training, parse
from examples.imagenet_data import ImageNet
from examples.imagenet_recipe import RECIPES
from examples.processes import Processes
from examples.stop import Stopped, StopRequest
from tests.examples.runs import only
from tests.training import same_state

MODEL, RATE, CLASSES = "tiny", 0.5, 4
TRAIN, VAL, BATCH = 47, 17, 8  # odd numbers, which leave images over in every division
STEPS = 2 * (TRAIN // BATCH)
TINY = f"--model {MODEL} --image-size 32 --epochs 2 --batch-size {BATCH} --lr 0.01 --ptarget {RATE}".split()
TINY += ["--allocation", "uniform", "--no-cuda", "--workers", "0", "--data-dir"]


class Versioned(nn.Sequential):
    """A network that checks the version of a state, as MNASNet of torchvision does."""

    _version = 1

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        assert metadata.get("version") == 1
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def tiny(num_classes: int, **_: object) -> nn.Module:
    """Return a fast network with what matters here: batch norm, blocks to shard, dropout, and a version."""
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    blocks = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), block)
    return Versioned(blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, num_classes))


tiny.__module__ = "torchvision.models.tiny"  # the script takes networks of torchvision only
register_model(MODEL)(tiny)


def draw(folder: Path) -> Path:
    """Draw the pictures: noise, in another colour for each class."""
    random = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for i in range(count):
            path = folder / split / f"n0000000{i % CLASSES}" / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 128, (40, 48, 3)) + np.array([0, 40 * (i % CLASSES), 0])
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def zeros_in(state: dict[str, Tensor]) -> tuple[int, int]:
    """Return the zeros and the number of prunable weights of a state, which a new network has to load."""
    network = get_model(MODEL, num_classes=CLASSES)
    network.load_state_dict(state)
    weights = [network.get_parameter(row.name) for row in feather_param.plan(network, final_rate=RATE).rows]
    return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads(only(folder, "runs/*/results.json").read_text())


def train(arguments: list[str], rank: int, world: int, folder: Path, at: int = -1) -> None:
    """Train in one of several processes, in the folder. Stop as if by Ctrl-C at a step, and resume."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    torch.distributed.barrier()  # the working folder is one for all
    processes, stop, step = Processes(rank, world, rank), StopRequest(), Training.step

    def interrupted(self: Training, batch: tuple[Tensor, Tensor]) -> None:
        step(self, batch)
        if self.step_count == at and rank == 1:  # only one process gets the signal
            stop.signal = signal.SIGINT

    Training.step = interrupted
    try:
        imagenet.train(parse(arguments), Path("runs"), stop, processes)
    except Stopped:
        torch.distributed.barrier()  # the first process has saved the checkpoint
        resumed = parse(["--resume", str(only(folder, "runs/*"))])
        imagenet.train(resumed, Path("runs"), StopRequest(), processes)
    finally:
        Training.step = step
    torch.distributed.barrier()


def agree_after_an_epoch(rank: int, world: int, folder: Path, *, parallel: str) -> None:
    """All processes have the same weights, averages and statistics, and evaluate together as one process does."""
    processes, images = Processes(rank, world, rank), folder / "images"
    options = parse([*TINY, str(images), "--recipe", "v2", "--parallel", parallel])
    recipe, cpu = RECIPES["v2"], torch.device("cpu")
    training = Training(options, ImageNet(images, recipe, 32, BATCH, 0, processes), cpu, processes)
    for batch in training.batches():
        training.step(batch)
    row = training.end_epoch()
    for model in (training.model, training.ema):
        assert model is not None
        for name, value in sharding.whole(model.state_dict()).items():
            assert processes.same(value), name
    plain = training.plain(training.plain_state(training.model))
    options.parallel = "ddp"
    alone = Training(options, ImageNet(images, recipe, 32, BATCH, 0, Processes()), cpu)
    expected = alone.evaluate(plain)
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def end_with_exact_zeros(
    rank: int, world: int, folder: Path, *, arguments: tuple[str, ...], name: str, interrupted: bool
) -> None:
    train([*TINY, str(folder / "images"), *arguments], rank, world, folder / name, at=3 if interrupted else -1)
    if rank > 0:
        return
    for path in (folder / name / "models").iterdir():
        state = torch.load(path, weights_only=True)
        zeros, total = zeros_in(state)
        assert zeros == round(RATE * total)
    results = results_of(folder / name)
    assert [(row["step"], row["images"]) for row in results["epochs"]] == [(2, VAL), (4, VAL)]
    assert results["layers"]
    assert ("ema" in results) == ("v2" in arguments)


def resumed_equals_uninterrupted(rank: int, world: int, folder: Path, *, names: tuple[str, str]) -> None:
    if rank > 0:
        return
    states = [{p.stem[20:]: torch.load(p) for p in (folder / name / "models").iterdir()} for name in names]
    assert states[0].keys() == states[1].keys()
    assert all(same_state(state, states[1][name]) for name, state in states[0].items())
    rows = [results_of(folder / name)["epochs"] for name in names]
    for first, second in zip(*rows, strict=True):  # the loss of each process is saved as the mean over them
        assert {**first, "train_loss": 0} == {**second, "train_loss": 0}
        assert abs(first["train_loss"] - second["train_loss"]) < 1e-6

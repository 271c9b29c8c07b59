"""Part c: seconds of an epoch of the networks of CIFAR-100 on random images, for several variants of the training.

Some steps are timed after a warm-up and multiplied by the steps of an epoch. Part d uses the fastest variant.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import timing
from benchmarks.cifar100_run import Run, RunTraining
from benchmarks.gpu.budget import Call, Figures, Part, Piece, Records, finished
from benchmarks.gpu.sizes import Sizes
from benchmarks.methods import DENSE
from benchmarks.together import Together
from examples.images import ImageData, Split

__all__ = ["COMPILING", "Variant", "Warm", "part", "variants"]

COMPILING = 45.0  # seconds to compile a network on 16 cores, forward and backward; measured on an H200
_CLASSES = 100
_RATE = 0.98

Warm = set[str]
"""The networks that this process has compiled for training together."""


@dataclass(frozen=True)
class Variant:
    """A variant of the training of a network.

    Attributes:
        network: its name.
        width: its width.
        count: number of networks that train at once.
        captured: whether the step is recorded in a CUDA graph.
        compiled: whether `torch.compile` is used. With neither of both, the plain loop makes the steps.
    """

    network: str
    width: float
    count: int
    captured: bool
    compiled: bool

    @property
    def name(self) -> str:
        """The name of the piece."""
        method = ["compiled"] * self.compiled + ["captured"] * self.captured or ["plain loop"]
        return f"{self.network} x {self.count}, {' and '.join(method)}"


def variants(sizes: Sizes) -> list[Variant]:
    """Return the variants in the order of their worth. Part d needs those that take the least time to measure."""
    kinds = [
        (sizes.together, True, False),
        (1, True, False),
        (sizes.together, True, True),
        (1, False, False),
        (1, True, True),
        (1, False, True),
    ]
    return [Variant(*network, *kind) for kind in kinds for network in sizes.networks]


def part(sizes: Sizes, device: torch.device, warm: Warm) -> Part:
    """Return the part."""
    loaded: list[ImageData] = []

    def plan(records: Records, room: float) -> list[Piece]:
        pieces, ready = [], set(warm)
        for variant in variants(sizes):
            seconds, reason = _expected(variant, ready, sizes.pace)
            if variant.compiled and seconds <= room and not finished(records.get(variant.name)):
                ready.add(variant.network)  # by this piece, before the later ones
            pieces.append(Piece(variant.name, seconds, reason, _maker(variant)))
        return pieces

    def _maker(variant: Variant) -> Callable[[Call], Figures]:
        def make(call: Call) -> Figures:
            if not loaded:
                loaded.append(_random_images(sizes, device))
            figures = _measure(variant, sizes, loaded[0], device)
            if variant.compiled:
                warm.add(variant.network)
            return figures

        return make

    return Part("c", "Seconds of an epoch", "c_epochs.json", plan, most=240.0)


def _expected(variant: Variant, ready: Warm, pace: float) -> tuple[float, str]:
    seconds, reason = (12.0, "two groups of eight: 4 s to build and record one, 70 steps of 12 ms")
    if variant.count == 1:
        seconds, reason = 6.0, "two networks: 2 s to build one, 70 steps of 3 to 15 ms"
    if variant.compiled and variant.network not in ready:
        seconds, reason = seconds + COMPILING, f"{reason}; a compilation of {COMPILING:.0f} s"
    return pace * seconds, reason


def _random_images(sizes: Sizes, device: torch.device) -> ImageData:
    """Return random images in the shape of CIFAR-100."""

    def split(count: int) -> Split:
        shape = (count, 3, sizes.image, sizes.image)
        images = torch.randint(256, shape, dtype=torch.uint8, device=device)
        return Split(images, torch.arange(count, device=device) % _CLASSES)

    mean, std = (0.5,) * 3, (0.29,) * 3
    return ImageData(split(sizes.images), split(_CLASSES), _CLASSES, padding=4, flip=True, mean=mean, std=std)


def _measure(variant: Variant, sizes: Sizes, data: ImageData, device: torch.device) -> Figures:
    """Return the times of a step and an epoch of one network, dense and sparse, and their ratio."""
    figures: dict[str, Any] = {"network": variant.network, "count": variant.count}
    figures |= {"compiled": variant.compiled, "captured": variant.captured}
    for kind, method, rate in (("sparse", "feather", _RATE), ("dense", DENSE, 0.0)):
        runs = [Run(variant.network, variant.width, method, rate, 0, 160, None) for _ in range(variant.count)]
        advance, steps = _trainer(variant, runs, sizes, data, device)
        seconds = _timed(advance, sizes) / variant.count
        figures[kind] = {"step": seconds, "epoch": seconds * steps}
    figures["sparse over dense"] = figures["sparse"]["step"] / figures["dense"]["step"]
    return figures


def _trainer(
    variant: Variant, runs: Sequence[Run], sizes: Sizes, data: ImageData, device: torch.device
) -> tuple[Callable[[int], None], int]:
    """Return a function that makes a number of steps of all runs, and the number of steps of an epoch."""
    if variant.captured or variant.compiled:
        backend = sizes.backend if variant.compiled else None
        together = Together(runs, data, device, backend=backend, captured=variant.captured)
        return together.advance, together.steps_per_epoch
    training = RunTraining(runs[0], data, device)

    def advance(count: int) -> None:
        for _ in range(count):
            training.next_step()

    return advance, training.batches.steps_per_epoch


def _timed(advance: Callable[[int], None], sizes: Sizes) -> float:
    """Return the seconds of a step, the mean over some steps after a warm-up."""
    advance(sizes.warm_up)
    timing.synchronise()
    start = time.perf_counter()
    advance(sizes.steps)
    timing.synchronise()
    return (time.perf_counter() - start) / sizes.steps

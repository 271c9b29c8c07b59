"""All parts, in the order of their worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.cifar100_results import Result
from benchmarks.cifar100_run import Run
from benchmarks.gpu import checks, epochs, kernels
from benchmarks.gpu.budget import Part, Records, read
from benchmarks.gpu.order import papers_runs, telling_runs
from benchmarks.gpu.page import FILES
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.tables import Order, Tables, contents
from examples.data import load_data
from examples.images import ImageData

__all__ = ["missing_data", "parts"]

_IMAGES = {"cifar100": 50_000, "digits": 1_437}
_FORMATS = ("cifar-100-python/train", "cifar-100-binary/train.bin")


def missing_data(folder: Path) -> str | None:
    """Return what is wrong with the folder of CIFAR-100; None if nothing is."""
    if any((folder / name).is_file() for name in _FORMATS):
        return None
    return f"expected a folder with cifar-100-python or cifar-100-binary, got {folder}, which has neither"


def parts(
    sizes: Sizes, device: torch.device, folder: Path, data: Path | None, letters: Sequence[str] | None
) -> list[Part]:
    """Return the parts with these letters; without any, all parts whose data set is there."""
    warm: epochs.Warm = set()

    def records(letter: str) -> Records:
        return read(folder / FILES[letter])["pieces"]

    def results() -> list[Result]:
        return [result for letter in ("d", "e") for result in contents(records(letter))]

    def load() -> ImageData:
        return load_data(sizes.dataset, data or Path("data")).to(device)

    tables = Tables(
        folder=folder / "checkpoints",
        load=load,
        device=device,
        images=_IMAGES[sizes.dataset],
        measured=lambda: records("c"),
        results=results,
        backend=sizes.backend,
        most=sizes.together,
        gpu=timing.machine()["gpu"],
        pace=sizes.pace,
        warm=warm,
    )
    orders: tuple[Order, Order] = telling_runs, papers_runs
    if sizes.rehearsed is not None:
        orders = _always(sizes.rehearsed[0]), _always(sizes.rehearsed[1])
    everything = {
        "a": checks.part(sizes),
        "b": kernels.part(sizes, device),
        "c": epochs.part(sizes, device, warm),
        "d": tables.part("d", "A smaller p after 160 epochs", FILES["d"], orders[0]),
        "e": tables.part("e", "The paper's table", FILES["e"], orders[1]),
    }
    possible = everything if sizes.rehearsed is not None or data is not None else "abc"
    return [everything[letter] for letter in (letters or possible)]


def _always(runs: Sequence[Run]) -> Order:
    return lambda results: [*runs]

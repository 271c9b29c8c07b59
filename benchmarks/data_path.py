"""Making training batches, over a plain DataLoader loop: `python -m benchmarks.data_path --data-dir DATA`.

Compares `examples.datasets.TrainBatches`, which crops, mirrors and normalises a whole batch at once, with what most
CIFAR scripts do: torchvision's transforms image by image in a DataLoader, without and with worker processes. A batch
has 128 images of CIFAR-100, normalised, on the training device.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks import timing
from examples.datasets import ImageData, TrainBatches, load_data

BATCH = 128


class OneByOne(Dataset[tuple[Tensor, int]]):
    """CIFAR-100 as torchvision serves it: an image at a time, through its transforms."""

    def __init__(self, data: ImageData) -> None:
        self.images = data.train.images.permute(0, 2, 3, 1).numpy()
        self.labels = data.train.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(data.mean, data.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def endless(loader: DataLoader[Any], device: torch.device) -> Iterator[Tensor]:
    """Yield images on the device, epoch after epoch."""
    while True:
        for images, _ in loader:
            yield images.to(device, non_blocking=True)


def several(make: Callable[[], Tensor], count: int) -> Callable[[], None]:
    """Return a way to make so many batches: with worker processes, one alone says nothing."""

    def work() -> None:
        for _ in range(count):
            make()

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=20, help="batches a round")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    data = load_data("cifar100", Path(arguments.data_dir))
    here = replace(data, train=data.train.to(device))
    batches = TrainBatches(here, BATCH, epochs=1000, seed=0)
    steps = iter(range(len(batches)))
    ways: dict[str, Callable[[], object]] = {
        "whole batches (ours)": several(lambda: here.normalise(batches[next(steps)][0]), arguments.batches)
    }
    for workers in arguments.workers:
        loader = DataLoader(
            OneByOne(data),
            BATCH,
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )
        images = endless(loader, device)
        ways[f"DataLoader, torchvision, {workers} workers"] = several(
            lambda images=images: next(images), arguments.batches
        )
    seconds = timing.rounds(ways, arguments.rounds)
    median = timing.medians(seconds)
    ours = next(iter(ways))
    figures = {
        name: {"seconds a batch": median[name] / arguments.batches, "over ours": timing.ratio(seconds, name, ours)}
        for name in ways
    }
    rows = [[name, f"{1e3 * row['seconds a batch']:.1f}", f"{row['over ours']:.1f}"] for name, row in figures.items()]
    print(timing.show(["batches of 128", "ms a batch", "over ours"], rows))
    print(f"\nwritten to {timing.write('data_path', figures)}")


if __name__ == "__main__":
    main()

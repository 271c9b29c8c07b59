"""Time of making a training batch, against a DataLoader: `python -m benchmarks.data_path --data-dir DATA`.

`examples.data.TrainBatches` crops, mirrors and normalises a whole batch at once. Most CIFAR scripts apply torchvision's
transforms to one image at a time in a DataLoader, with or without worker processes. A batch has 128 normalised images
of CIFAR-100 on the training device. On a GPU, `benchmarks.augmentation` also makes them in one kernel.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks import timing
from benchmarks.augmentation import augment
from examples.data import ImageData, TrainBatches, load_data

BATCH = 128


class OneByOne(Dataset[tuple[Tensor, int]]):
    """CIFAR-100 with torchvision's transforms, one image at a time."""

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
    """Return a function that makes this number of batches. With worker processes, one batch would measure nothing."""

    def work() -> None:
        for _ in range(count):
            make()

    return work


def in_one_kernel(data: ImageData, batches: TrainBatches) -> Callable[[], Tensor]:
    """Return a function that makes the next batch of the first epoch, in float32."""
    drawn, device = batches.draw(0), data.train.images.device
    steps = itertools.cycle(torch.arange(len(data.train) // BATCH, device=device).split(1))
    return lambda: augment(data, drawn, next(steps), BATCH, torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=20, help="number of batches in a round")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    data = load_data("cifar100", Path(arguments.data_dir))
    on_device = data.to(device)
    batches = TrainBatches(on_device, BATCH, epochs=1000, seed=0)
    steps = iter(range(len(batches)))
    variants: dict[str, Callable[[], object]] = {
        "whole batches (ours)": several(lambda: on_device.normalise(batches[next(steps)][0]), arguments.batches)
    }
    if device.type == "cuda":
        variants["in one kernel"] = several(in_one_kernel(on_device, batches), arguments.batches)
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
        variants[f"DataLoader, torchvision, {workers} workers"] = several(
            lambda images=images: next(images), arguments.batches
        )
    seconds = timing.rounds(variants, arguments.rounds)
    median = timing.medians(seconds)
    ours = next(iter(variants))
    figures = {
        name: {"seconds a batch": median[name] / arguments.batches, "over ours": timing.ratio(seconds, name, ours)}
        for name in variants
    }
    rows = [[name, f"{1e3 * row['seconds a batch']:.1f}", f"{row['over ours']:.1f}"] for name, row in figures.items()]
    print(timing.show(["batches of 128", "ms a batch", "over ours"], rows))
    print(f"\nwritten to {timing.write('data_path', figures)}")


if __name__ == "__main__":
    main()

"""An ImageNet folder, and its batches. They depend on the seed and the step only, not on the number of workers.

The images are read with torchvision: train/<class>/*.JPEG and val/<class>/*.JPEG.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler
from torchvision.datasets import ImageFolder

from examples.data import loading
from examples.imagenet_recipe import Recipe
from examples.processes import Processes
from examples.resumable import UserError

Batch = tuple[Tensor, Tensor]
HOW = (
    "ImageNet may not be passed on, so nothing is downloaded: register at image-net.org, put the archives "
    "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz into the folder, and call "
    "torchvision.datasets.ImageNet(folder, split) with split 'train' and 'val', which unpacks them"
)


def mixed_seed(*numbers: int) -> int:
    """Return a seed that depends on all the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class ImageNet:
    """The training and validation images of a folder, as batches of one of several processes.

    All training batches of all processes have the same size: images that fill no batch are left out of the epoch.

    Args:
        folder: the folder that holds ``train`` and ``val``.
        recipe: the augmentation.
        size: width and height of a training image.
        batch_size: number of images in a batch of one process.
        seed: seed of the order of the images and of their augmentation.
        processes: the processes that train together.

    Raises:
        UserError: a folder is missing, has other classes than the other, or holds too few images.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, size: int, batch_size: int, seed: int, processes: Processes
    ) -> None:
        self.train, self.val = _read(folder / "train"), _read(folder / "val")
        if self.train.classes != self.val.classes:
            differ = sorted(set(self.train.classes) ^ set(self.val.classes))
            raise UserError(
                f"expected the same class folders in {folder / 'train'} and {folder / 'val'}, got "
                f"{len(self.train.classes)} and {len(self.val.classes)}, for example {differ[0]} in one of them only"
            )
        if self.classes < 2:
            raise UserError(f"expected folders of two classes or more in {folder / 'train'}, got one class")
        self.train.transform, self.val.transform = recipe.train_transform(size), recipe.val_transform(size)
        self.batch_size, self.seed, self.processes = batch_size, seed, processes
        self.steps_per_epoch = len(self.train) // processes.count // batch_size
        if self.steps_per_epoch == 0:
            raise UserError(
                f"expected a batch of {batch_size} images for each of {processes.count} processes, got "
                f"{len(self.train)} images in {folder / 'train'}: lower --batch-size"
            )

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.train.classes)

    @property
    def images_per_step(self) -> int:
        """Number of images in the batches of all processes."""
        return self.batch_size * self.processes.count

    def train_batches(self, epoch: int, first: int, workers: int, pinned: bool) -> DataLoader[Batch]:
        """Return the batches of this process from the first one that is left of an epoch to the last."""
        count, rank = self.processes.count, self.processes.rank
        order = DistributedSampler(self.train, count, rank, seed=self.seed, drop_last=True)
        order.set_epoch(epoch)
        chosen = list(islice(BatchSampler(order, self.batch_size, drop_last=True), first, None))
        images = _Seeded(self.train, self.seed, epoch)
        return DataLoader(images, batch_sampler=chosen, **loading(workers, pinned))

    def val_batches(self, workers: int, pinned: bool) -> DataLoader[Batch]:
        """Return the validation batches of this process: the same number in all processes, as FSDP2 needs.

        The last images may be repetitions, see `val_count`.
        """
        order = DistributedSampler(self.val, self.processes.count, self.processes.rank, shuffle=False)
        images = _Seeded(self.val, self.seed, 0)
        return DataLoader(images, batch_size=self.batch_size, sampler=order, **loading(workers, pinned))

    @property
    def val_count(self) -> int:
        """Number of validation images of this process. Those that follow in its batches are repetitions."""
        return len(range(self.processes.rank, len(self.val), self.processes.count))


class _Seeded(Dataset[Any]):
    """Images whose augmentation depends on the seed, the epoch and the index."""

    def __init__(self, folder: ImageFolder, seed: int, epoch: int) -> None:
        self.folder, self.seed, self.epoch = folder, seed, epoch

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        # Not torch.manual_seed: it would seed the GPUs as well.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed_seed(self.seed, self.epoch, index))
            try:
                return self.folder[index]
            except (OSError, SyntaxError) as error:  # pillow raises both
                raise OSError(f"the image {self.folder.samples[index][0]} cannot be read: {error}") from error


def _read(folder: Path) -> ImageFolder:
    expected = f"expected a folder of images for each class in {folder} (such as {folder / 'n01440764' / '*.JPEG'})"
    try:
        return ImageFolder(str(folder))
    except FileNotFoundError as error:
        state = "which has none for some or all classes" if folder.is_dir() else "which does not exist"
        raise UserError(f"{expected}, got a folder {state}: {HOW}") from error

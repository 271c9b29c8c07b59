"""Images as byte tensors with their labels, and subsets of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from examples.resumable import UserError

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Split:
    """Images, uint8 [number, channels, height, width], and their labels, int64 [number]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """Return the split on a device."""
        return Split(self.images.to(device), self.labels.to(device))

    def batches(self, size: int) -> Iterator[Batch]:
        """Return the images and labels in batches, in their order; the last batch may be smaller."""
        return zip(self.images.split(size), self.labels.split(size), strict=True)


@dataclass(frozen=True)
class ImageData:
    """A data set.

    Attributes:
        train: the images to train on.
        test: the images to test on.
        classes: number of classes.
        padding: black pixels added on each side of an image before a random crop of its original size.
        flip: whether the augmentation mirrors images.
        mean: mean of each channel over the training images, in [0, 1].
        std: standard deviation of each channel over the training images.
    """

    train: Split
    test: Split
    classes: int
    padding: int
    flip: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return self.train.images.shape[1]

    def to(self, device: torch.device) -> ImageData:
        """Return the data set on a device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def normalise(self, images: Tensor) -> Tensor:
        """Return byte images as floats with mean 0 and deviation 1 in each channel, channels last in memory."""
        mean, std = (per_channel(values, images.device) for values in (self.mean, self.std))
        return ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


@cache
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers in the shape [1, channels, 1, 1].

    They are cached, because a copy to a GPU blocks, and kept, because a CUDA graph may read them at each replay.
    """
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(1, -1, 1, 1)


def balanced_subset(split: Split, size: int) -> Split:
    """Return a fixed subset in which the numbers of images of the classes differ by as little as possible.

    Raises:
        UserError: the split has fewer images.
    """
    if size > len(split):
        raise UserError(f"expected --train-size to be at most the {len(split)} images of the data set, got {size}")
    order = np.random.default_rng(0).permutation(len(split))
    labels = split.labels.numpy()[order]
    rank = np.empty(len(split), dtype=np.int64)  # position of each image among those of its class
    for label in np.unique(labels):
        indices = np.flatnonzero(labels == label)
        rank[indices] = np.arange(len(indices))
    chosen = torch.from_numpy(np.sort(order[np.lexsort((labels, rank))[:size]]))
    return Split(split.images[chosen], split.labels[chosen])


def first_classes(data: ImageData, count: int) -> ImageData:
    """Return the images of the first classes only, with the same normalisation."""

    def kept(split: Split) -> Split:
        here = split.labels < count
        return Split(split.images[here], split.labels[here])

    return replace(data, train=kept(data.train), test=kept(data.test), classes=count)

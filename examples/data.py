"""Data sets as byte tensors, and batches that depend only on the seed and the step.

A resumed run sees the same batches, with any number of worker processes and on any device.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.images import Batch, ImageData, Split, balanced_subset, first_classes
from examples.resumable import UserError
from feather_param.utils.signals import leave_to_parent


@dataclass(frozen=True)
class Epoch:
    """The random numbers of one epoch.

    Attributes:
        order: the images in the order of the epoch, int64 [number].
        shifts: upper and left edge of each crop in the padded image, in the same order, int64 [2, number].
        flips: whether each is mirrored, in the same order, bool [number].
    """

    order: Tensor
    shifts: Tensor
    flips: Tensor


class TrainBatches(Dataset[Batch]):
    """All training batches of a run, indexed by step. Images are shuffled every epoch, cropped and mirrored at random.

    The last batch of an epoch may be smaller. It is left out if it is too small for batch norm.

    Args:
        data: the data set. Batches are made on the device of its images.
        batch_size: number of images in a batch.
        epochs: number of epochs.
        seed: seed of the order and of the augmentation.
        least: smallest number of images in a batch: two for each process.
    """

    def __init__(self, data: ImageData, batch_size: int, epochs: int, seed: int, least: int = 2) -> None:
        self.data = data
        self.batch_size = batch_size
        self.epochs = epochs
        self.seed = seed
        self.steps_per_epoch = max(1, -(-(len(data.train) - least + 1) // batch_size))
        self._last: tuple[int, Epoch] | None = None  # cache of the last epoch

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch

    def __getitem__(self, step: int) -> Batch:
        """Return the byte images and the labels of a step."""
        epoch, i = divmod(step, self.steps_per_epoch)
        drawn = self.draw(epoch)
        part = slice(i * self.batch_size, (i + 1) * self.batch_size)
        train, chosen = self.data.train, drawn.order[part]
        images = crop_and_flip(train.images[chosen], self.data.padding, drawn.shifts[:, part], drawn.flips[part])
        return images, train.labels[chosen]

    def draw(self, epoch: int) -> Epoch:
        """Return the random numbers of an epoch on the device of the images. A GPU waits for them once an epoch."""
        if self._last is None or self._last[0] != epoch:
            count, device = len(self.data.train), self.data.train.images.device
            random = np.random.default_rng((self.seed, epoch))
            order = random.permutation(count)
            shifts = random.integers(0, 2 * self.data.padding + 1, size=(2, count))
            flips = random.integers(0, 2, size=count).astype(bool) & self.data.flip
            drawn = Epoch(*(torch.from_numpy(values).to(device) for values in (order, shifts, flips)))
            self._last = (epoch, drawn)
        return self._last[1]


def batch_loader(batches: TrainBatches, first_step: int, workers: int, device: torch.device) -> DataLoader[Batch]:
    """Return the batches from a step on. Worker processes prepare them if their number is not 0."""
    return DataLoader(
        batches,
        batch_size=None,  # an item is a batch
        sampler=range(first_step, len(batches)),
        **loading(workers, pinned=workers > 0 and device.type == "cuda"),
    )


def loading(workers: int, pinned: bool) -> dict[str, Any]:
    """Return the arguments of a `DataLoader` that leaves Ctrl-C and the global generator to the program."""
    return {
        "num_workers": workers,
        "pin_memory": pinned,
        "worker_init_fn": _leave_signals,
        "generator": torch.Generator(),  # the default would draw from the global generator
    }


def _leave_signals(worker: int) -> None:
    leave_to_parent()  # which still needs its workers to stop at a checkpoint
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a batch system sends it to all processes


def crop_and_flip(images: Tensor, padding: int, shifts: Tensor, flips: Tensor) -> Tensor:
    """Pad each image with black, crop it to its original size, and mirror the chosen ones left to right.

    Args:
        images: [batch, channels, height, width].
        padding: pixels added on each side.
        shifts: upper and left edge of each crop in the padded image, int64 [2, batch].
        flips: images to mirror, bool [batch].
    """
    batch, channels, height, width = images.shape
    device = images.device
    padded = F.pad(images, (padding,) * 4)
    rows = shifts[0, :, None] + torch.arange(height, device=device)
    columns = shifts[1, :, None] + torch.arange(width, device=device)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    image = torch.arange(batch, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def load_data(name: str, folder: Path, train_size: int | None = None) -> ImageData:
    """Load a data set.

    Args:
        name: ``cifar100``, ``cifar10``, ``digits``, or ``ten`` for the first ten classes of CIFAR-100: 5,000 training
            and 1,000 test images, normalised as all of CIFAR-100.
        folder: parent of torchvision's folder or of the official binary version; a missing set is downloaded to it.
        train_size: number of training images to keep; None for all.

    Raises:
        UserError: the download failed, or a file is damaged.
    """
    if name == "digits":
        data = _digits()
    elif name == "ten":
        data = first_classes(_cifar(_CIFAR["cifar100"], folder), 10)
    else:
        data = _cifar(_CIFAR[name], folder)
    return data if train_size is None else replace(data, train=balanced_subset(data.train, train_size))


def _digits() -> ImageData:
    """Return scikit-learn's handwritten digits: grey images of 8 x 8 pixels, four fifths of them for training."""
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    scaled = (np.asarray(pixels) * (255 / 16)).round().astype(np.uint8)  # from 0 to 16
    images = torch.from_numpy(scaled).view(-1, 1, 8, 8)
    labels = torch.from_numpy(np.asarray(target, dtype=np.int64))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
    train, test = order[: len(labels) * 4 // 5], order[len(labels) * 4 // 5 :]
    return ImageData(
        train=Split(images[train], labels[train]),
        test=Split(images[test], labels[test]),
        classes=10,
        padding=1,  # an eighth of the image, as 4 of 32
        flip=False,
        mean=(0.305,),
        std=(0.376,),
    )


@dataclass(frozen=True)
class _Cifar:
    """The files of a CIFAR data set and their format."""

    name: str
    classes: int
    files: tuple[tuple[str, ...], tuple[str, ...]]  # of the training and of the test split; ".bin" follows if binary
    python_folder: str
    python_key: str
    binary_folder: str
    binary_labels: int  # label bytes before the pixels of an image; the last is the class
    mean: tuple[float, ...]
    std: tuple[float, ...]


_CIFAR = {
    "cifar100": _Cifar(
        name="CIFAR100",
        classes=100,
        files=(("train",), ("test",)),
        python_folder="cifar-100-python",
        python_key="fine_labels",
        binary_folder="cifar-100-binary",
        binary_labels=2,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
    "cifar10": _Cifar(
        name="CIFAR10",
        classes=10,
        files=(tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)),
        python_folder="cifar-10-batches-py",
        python_key="labels",
        binary_folder="cifar-10-batches-bin",
        binary_labels=1,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
}
_PIXELS = 3 * 32 * 32


def _cifar(kind: _Cifar, folder: Path) -> ImageData:
    names = [name for split in kind.files for name in split]
    python, binary = folder / kind.python_folder, folder / kind.binary_folder
    if not all((python / name).is_file() for name in names):
        if all((binary / f"{name}.bin").is_file() for name in names):
            return _read_cifar(kind, lambda name: _checked(kind, binary / f"{name}.bin", _read_binary))
        _download(kind, folder)
    return _read_cifar(kind, lambda name: _checked(kind, python / name, _read_python))


def _download(kind: _Cifar, folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        import torchvision

        getattr(torchvision.datasets, kind.name)(str(folder), download=True)
    # Many errors are possible: no network, a wrong checksum, a full disk, no torchvision.
    except Exception as error:
        with contextlib.suppress(OSError):  # the folder is not empty, or was never made
            for path in missing:
                path.rmdir()

        def put(what: str, name: str) -> str:
            exists = (folder / name).is_dir()
            return f"replace the folder {name}, which lacks files" if exists else f"put {what} {name} there"

        raise UserError(
            f"expected {kind.name} in {folder} or a download, got {type(error).__name__} ({error}); "
            f"do one of three things: {put('the torchvision folder', kind.python_folder)}, "
            f"{put('the official binary version', kind.binary_folder)}, or use --dataset digits"
        ) from error


def _read_cifar(kind: _Cifar, read: Callable[[str], tuple[np.ndarray, np.ndarray]]) -> ImageData:
    def split(names: tuple[str, ...]) -> Split:
        parts = [read(name) for name in names]
        images = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([labels for _, labels in parts]).astype(np.int64)
        return Split(torch.from_numpy(images), torch.from_numpy(labels))

    train, test = (split(names) for names in kind.files)
    return ImageData(train, test, kind.classes, padding=4, flip=True, mean=kind.mean, std=kind.std)


def _checked(
    kind: _Cifar, path: Path, read: Callable[[_Cifar, Path], tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    try:
        pixels, labels = read(kind, path)
        valid = pixels.dtype == np.uint8 and pixels.shape == (len(labels), _PIXELS) and len(labels) > 0
    except Exception as error:  # a damaged pickle may raise any error
        raise UserError(
            f"expected {kind.name} in {path}, got {type(error).__name__} ({error}): the file is damaged or incomplete, "
            f"fetch {path.parent.name} again"
        ) from error
    if not valid or not 0 <= labels.min() <= labels.max() < kind.classes:
        raise UserError(f"expected {kind.name} in {path}, got something else: fetch {path.parent.name} again")
    return pixels, labels


def _read_python(kind: _Cifar, path: Path) -> tuple[np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        content = pickle.load(file, encoding="latin1")
    return content["data"], np.asarray(content[kind.python_key])


def _read_binary(kind: _Cifar, path: Path) -> tuple[np.ndarray, np.ndarray]:
    content, record = np.fromfile(path, dtype=np.uint8), kind.binary_labels + _PIXELS
    if content.size % record:
        raise ValueError(f"{content.size} bytes, which is no multiple of the {record} bytes of an image")
    records = content.reshape(-1, record)
    return np.ascontiguousarray(records[:, kind.binary_labels :]), records[:, kind.binary_labels - 1]

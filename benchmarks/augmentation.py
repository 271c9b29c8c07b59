"""A training batch in one kernel: crop, mirror, normalise and convert, for a step that a CUDA graph can read."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from examples.data import Epoch, crop_and_flip
from examples.images import ImageData
from feather_param.ops.gpu_kernels import kernels

__all__ = ["augment"]


def augment(data: ImageData, drawn: Epoch, step: Tensor, batch_size: int, dtype: torch.dtype) -> Tensor:
    """Return the images of a step of an epoch: cropped, mirrored and normalised.

    Batch number s has the images ``order[s * batch_size : (s + 1) * batch_size]``. In float32, it equals
    ``data.normalise(crop_and_flip(...))`` on a CPU bit for bit, on every device with Triton. Without Triton, a GPU
    uses torch's operations, which divide by 255 with a rounded product.

    Nothing waits for the device. After a first call, which compiles the kernel, a CUDA graph can record a call.

    Args:
        data: the data set. The batch is made on the device of its images.
        drawn: the random numbers of the epoch, as `TrainBatches.draw` makes them, contiguous, on the same device.
        step: number of the batch in the epoch, int64 [1] on the same device. Its value is not checked: beyond the last
            whole batch, the kernel returns NaN, and torch's operations raise an error.
        batch_size: number of images.
        dtype: dtype of the result.

    Returns:
        [batch_size, channels, height, width], channels last in memory.

    Raises:
        ValueError: the images are not contiguous, or fewer than a batch.

    Example::

        >>> from examples.data import TrainBatches
        >>> from examples.images import ImageData, Split
        >>> train = Split(torch.full((6, 1, 8, 8), 255, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64))
        >>> data = ImageData(train, train, classes=1, padding=0, flip=True, mean=(0.5,), std=(0.25,))
        >>> drawn = TrainBatches(data, batch_size=2, epochs=1, seed=0).draw(0)
        >>> batch = augment(data, drawn, torch.tensor([1]), 2, torch.bfloat16)
        >>> batch.shape, batch.unique()
        (torch.Size([2, 1, 8, 8]), tensor([2.], dtype=torch.bfloat16))
    """
    images = data.train.images
    if not images.is_contiguous():
        raise ValueError(f"expected contiguous images, got strides {images.stride()}; call contiguous() on them once")
    if not 1 <= batch_size <= len(images):
        raise ValueError(
            f"expected a batch of 1 to {len(images)} images, got {batch_size}; choose a smaller batch or more images"
        )
    if images.is_cuda and kernels(images.device):
        return importlib.import_module("benchmarks.augmentation_triton").augment(data, drawn, step, batch_size, dtype)
    place = step * batch_size + torch.arange(batch_size, device=images.device)
    chosen = images[drawn.order[place]]
    return data.normalise(crop_and_flip(chosen, data.padding, drawn.shifts[:, place], drawn.flips[place])).to(dtype)

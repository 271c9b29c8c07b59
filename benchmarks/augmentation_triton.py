"""The Triton kernel that makes a batch: it crops, mirrors and normalises byte images.

The kernel reads the images as `ImageData` holds them, channel by channel. A row of a CIFAR image then has 32 bytes,
which is the least that a GPU reads. Images with the channels last would be read in about as many pieces, and the data
set would be stored twice.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false
# (`tl.constexpr` parameters accept plain numbers, but their annotation does not say so)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from examples.data import Epoch
from examples.images import ImageData, per_channel

_BLOCK = 1024


@triton.jit
def _augment_kernel(
    images,
    order,
    shifts,
    flips,
    step,
    mean,
    std,
    out,
    number,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SIZE: tl.constexpr = CHANNELS * HEIGHT * WIDTH
    own = tl.program_id(0).to(tl.int64)  # number of the image in the batch
    place = tl.load(step) * tl.num_programs(0) + own  # in the epoch
    exists = (place >= 0) & (place < number)
    image = tl.load(order + place, mask=exists, other=0)
    top = tl.load(shifts + place, mask=exists, other=0).to(tl.int32) - PADDING
    left = tl.load(shifts + number + place, mask=exists, other=0).to(tl.int32) - PADDING
    flip = tl.load(flips + place, mask=exists, other=0) != 0

    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # in the result: channels are innermost
    there = at < SIZE
    channel, pixel = at % CHANNELS, at // CHANNELS
    y, x = pixel // WIDTH, pixel % WIDTH
    row = top + y
    column = left + tl.where(flip, WIDTH - 1 - x, x)
    inside = (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)  # else in the black border
    source = image * SIZE + ((channel * HEIGHT + row) * WIDTH + column)
    value = tl.load(images + source, mask=there & inside & exists, other=0).to(tl.float32)
    # Exact division, in the order of `ImageData.normalise`. Without a product, no multiply-add can change the rounding.
    centred = tl.div_rn(value, 255.0) - tl.load(mean + channel)
    normal = tl.div_rn(centred, tl.load(std + channel))
    tl.store(out + own * SIZE + at, tl.where(exists, normal, float("nan")), mask=there)  # rounded to the dtype of `out`


def augment(data: ImageData, drawn: Epoch, step: Tensor, batch_size: int, dtype: torch.dtype) -> Tensor:
    """Make a batch, as `augmentation.augment` does. A batch beyond the end of the epoch is NaN."""
    images = data.train.images
    number, channels, height, width = images.shape
    out = torch.empty(
        (batch_size, channels, height, width), dtype=dtype, device=images.device, memory_format=torch.channels_last
    )
    with torch.cuda.device_of(images):
        _augment_kernel[(batch_size, triton.cdiv(channels * height * width, _BLOCK))](
            images,
            drawn.order,
            drawn.shifts,
            drawn.flips,
            step,
            per_channel(data.mean, images.device),
            per_channel(data.std, images.device),
            out,
            number,
            CHANNELS=channels,
            HEIGHT=height,
            WIDTH=width,
            PADDING=data.padding,
            BLOCK=_BLOCK,
        )
    return out

"""What floating dtypes can hold, and the bit patterns of their numbers."""

from __future__ import annotations

import torch
from torch import Tensor

# The integers that hold a dtype's bits.
INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
INFINITY_BITS = {  # only NaNs lie above
    torch.float64: 0x7FF0000000000000,
    torch.float32: 0x7F800000,
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
}


def flat(tensor: Tensor) -> Tensor:
    """Return a tensor's elements in the order of its memory, as a view where there are no gaps in it."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)


def smallest_kept(dtype: torch.dtype) -> float:
    """Return the smallest magnitude that survives arithmetic in a dtype.

    Subnormals are flushed to zero on some devices, except in float16, whose smallest normal number, 6e-5, is
    too large to stand for nothing.
    """
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps if dtype == torch.float16 else info.smallest_normal


def rounded_down(threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a threshold in the precision for weights of a dtype; in float32, it cuts these at the same place."""
    if dtype == torch.float64:
        return threshold.double()
    narrow = threshold.float()
    if threshold.dtype == torch.float64:
        narrow = torch.where(narrow > threshold, narrow.nextafter(torch.zeros_like(narrow)), narrow)
    return narrow

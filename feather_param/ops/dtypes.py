"""Floating dtypes: their bit patterns, the dtype in which magnitudes are compared, and the smallest safe number.

Magnitudes are not negative, so they have the order of their bit patterns read as integers. The k-th magnitude is
therefore found among integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bits = NDArray[np.signedinteger[Any]]
"""The bit patterns of floating-point numbers, as integers."""

# The integer dtype of the same width.
INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
# The bit pattern of infinity. Of the magnitudes, only NaNs have larger ones.
INFINITY_BITS = {
    torch.float64: 0x7FF0000000000000,
    torch.float32: 0x7F800000,
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
}


def flat(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor as one dimension, in memory order; a view if the memory has no gaps."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype in which the magnitudes of tensors are ranked together.

    This is their common dtype if they have one. Otherwise it is float64 if a tensor is float64, else float32.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1 and dtypes <= INTEGER.keys():
        return dtypes.pop()
    return torch.float64 if torch.float64 in dtypes else torch.float32


def as_threshold(magnitude: Tensor) -> Tensor:
    """Return a magnitude in the precision of a threshold: float64 stays, all other dtypes become float32."""
    return magnitude if magnitude.dtype == torch.float64 else magnitude.float()


def rounded_down(threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a threshold in the precision in which weights of a dtype are compared: float64 or float32.

    A float64 threshold is rounded towards zero to float32. Rounding does not change which float32
    numbers are above it.
    """
    if dtype == torch.float64:
        return threshold.double()
    narrow = threshold.float()
    if threshold.dtype == torch.float64:
        narrow = torch.where(narrow > threshold, narrow.nextafter(torch.zeros_like(narrow)), narrow)
    return narrow


def smallest_kept(dtype: torch.dtype) -> float:
    """Return the smallest magnitude that arithmetic in a dtype does not flush to zero.

    Some devices flush subnormal numbers to zero, so this is the smallest normal number. In float16 it is the smallest
    subnormal number instead: devices keep these, and the smallest normal number, 6e-5, is too large to be negligible.
    """
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps if dtype == torch.float16 else info.smallest_normal

"""The k-th magnitude by counting: on a GPU, and where several processes share the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from feather_param.ops.distributed import Sum
from feather_param.ops.dtypes import INFINITY_BITS, INTEGER, flat
from feather_param.ops.kth_cpu import common_dtype
from feather_param.ops.triton import kernels

# Widths and places of the digits of a magnitude's 31 bits, from the exponent down.
_DIGITS = ((8, 23), (8, 15), (8, 7), (7, 0))


def kth_by_digits(tensors: Sequence[Tensor], k: int, add_up: Sum) -> Tensor:
    """Return the k-th smallest magnitude without waiting for the device; NaN if something is not finite.

    A histogram of the first digits tells the first digit, one of those that begin with it the second, and so on.
    """
    device = tensors[0].device
    dtype = common_dtype(tensors)
    values = torch.cat([flat(tensor.to(device, dtype)) for tensor in tensors])
    prefix = torch.zeros((), dtype=torch.int32, device=device)
    rank = torch.full((), k, dtype=torch.int64, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    for width, shift in _DIGITS if k else _DIGITS[:1]:  # what stands below them all is 0
        histogram = torch.zeros(256, dtype=torch.int64, device=device)
        kernels(device).kth.add_histogram(histogram, values, prefix, shift, width)  # type: ignore[union-attr]
        histogram = add_up(histogram)
        if shift == _DIGITS[0][1]:
            finite = histogram[-1] == 0  # the largest exponent is that of infinity and NaN
        up_to = histogram.cumsum(0)
        digit = (up_to < rank).sum()
        rank = rank - (up_to - histogram).gather(0, digit.view(1)).view(())
        prefix = (prefix << width) | digit.to(torch.int32)
    return torch.where(finite, prefix.view(torch.float32), math.nan)


def kth_by_bits(tensors: Sequence[Tensor], k: int, add_up: Sum) -> Tensor:
    """Return the k-th smallest magnitude without waiting for the device; NaN if something is not finite.

    It is the largest number that has fewer than k magnitudes below it, and is built from its highest bit down.
    """
    device = tensors[0].device
    dtype = torch.float64 if common_dtype(tensors) == torch.float64 else torch.float32
    bits = torch.cat([flat(tensor.to(device, dtype)) for tensor in tensors]).abs_().view(INTEGER[dtype])
    kth = torch.zeros((), dtype=INTEGER[dtype], device=device)
    for bit in reversed(range(8 * kth.element_size() - 1 if k else 0)):
        candidate = kth + (1 << bit)
        kth = torch.where(add_up((bits < candidate).sum()) < k, candidate, kth)
    finite = add_up((bits >= INFINITY_BITS[dtype]).sum()) == 0
    return torch.where(finite, kth.view(dtype), torch.full((), math.nan, dtype=dtype, device=device))

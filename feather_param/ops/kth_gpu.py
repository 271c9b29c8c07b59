"""The k-th magnitude on a GPU, and of weights that are sharded over processes: by counting magnitudes.

Nothing here waits for the device, and processes exchange counts only. With Triton the magnitude is found digit by digit
(`kth_by_digits`, whose kernel is in `kth_triton`), otherwise bit by bit (`kth_by_bits`, which runs on any device).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from feather_param.ops.distributed import Sum
from feather_param.ops.dtypes import INFINITY_BITS, INTEGER, common_dtype, flat

# Width and lowest bit of each digit of a float32 magnitude, a number of 31 bits. The first digit is the exponent.
_DIGITS = ((8, 23), (8, 15), (8, 7), (7, 0))


def kth_by_digits(tensors: Sequence[Tensor], k: int | Tensor, add_up: Sum, gpu: ModuleType) -> Tensor:
    """Return the k-th smallest magnitude as a 0-dim float32 tensor; NaN if an element is not finite.

    A histogram of the first digit of all magnitudes gives the first digit of the result. A histogram of the second
    digit, of the magnitudes that begin with this first digit, gives the second digit, and so on.
    ``gpu`` is the module with the kernel, `kth_triton`.
    """
    device = tensors[0].device
    dtype = common_dtype(tensors)
    values = torch.cat([flat(tensor.to(device, dtype)) for tensor in tensors])
    prefix = torch.zeros((), dtype=torch.int32, device=device)
    rank = k if isinstance(k, Tensor) else torch.full((), k, dtype=torch.int64, device=device)  # among the magnitudes that begin with the prefix
    finite = torch.ones((), dtype=torch.bool, device=device)
    for width, shift in _DIGITS if isinstance(k, Tensor) or k else _DIGITS[:1]:  # k = 0: only to check that all are finite
        histogram = torch.zeros(256, dtype=torch.int64, device=device)
        gpu.add_histogram(histogram, values, prefix, shift, width)
        histogram = add_up(histogram)
        if shift == _DIGITS[0][1]:
            finite = histogram[-1] == 0  # infinity and NaN have the largest exponent
        up_to = histogram.cumsum(0)
        digit = (up_to < rank).sum()
        rank = rank - (up_to - histogram).gather(0, digit.view(1)).view(())
        prefix = (prefix << width) | digit.to(torch.int32)
    return torch.where(finite, prefix.view(torch.float32), math.nan)


def kth_by_bits(tensors: Sequence[Tensor], k: int | Tensor, add_up: Sum) -> Tensor:
    """Return the k-th smallest magnitude as a 0-dim tensor, float64 or float32; NaN if an element is not finite.

    The result is the largest number that has fewer than k magnitudes below it. It is built from its highest bit down.
    """
    device = tensors[0].device
    dtype = torch.float64 if common_dtype(tensors) == torch.float64 else torch.float32
    bits = torch.cat([flat(tensor.to(device, dtype)) for tensor in tensors]).abs_().view(INTEGER[dtype])
    kth = torch.zeros((), dtype=INTEGER[dtype], device=device)
    for bit in reversed(range(8 * kth.element_size() - 1 if isinstance(k, Tensor) or k else 0)):
        candidate = kth + (1 << bit)
        kth = torch.where(add_up((bits < candidate).sum()) < k, candidate, kth)
    finite = add_up((bits >= INFINITY_BITS[dtype]).sum()) == 0
    return torch.where(finite, kth.view(dtype), torch.full((), math.nan, dtype=dtype, device=device))

"""The Triton kernel behind the k-th magnitude on a GPU: a histogram of one digit of the magnitudes."""

# pyright: reportArgumentType=false, reportOperatorIssue=false
# (`tl.constexpr` parameters accept plain numbers, but their annotation does not say so)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_MAX_PROGRAMS = 2048  # each adds its own histogram to the common one once


@triton.jit
def _histogram_kernel(values, n, prefix, histogram, SHIFT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    wanted = tl.load(prefix)
    bins = tl.arange(0, 256)
    counts = tl.zeros([256], tl.int32)
    others = tl.zeros([BLOCK], tl.int32)  # lanes whose element is not to be counted
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n, tl.num_programs(0).to(tl.int64) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < n
        bits = tl.load(values + at, mask=there, other=0.0).to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        counted = there & ((bits >> (SHIFT + WIDTH)) == wanted)
        digit = (bits >> SHIFT) & (2**WIDTH - 1)
        counts += tl.histogram(tl.where(counted, digit, 0), 256)
        others += 1 - counted.to(tl.int32)
    counts -= tl.where(bins == 0, tl.sum(others, axis=0), 0)  # these lanes were counted in the first bin
    tl.atomic_add(histogram + bins, counts.to(tl.int64))


def add_histogram(histogram: Tensor, values: Tensor, prefix: Tensor, shift: int, width: int) -> None:
    """Count the magnitudes that begin with a prefix, by the digit that follows the prefix.

    A magnitude is the bit pattern of ``|value|`` as float32, an integer of 31 bits.

    Args:
        histogram: int64 of shape (256,); the counts are added to it.
        values: float32, float16 or bfloat16, contiguous, of one dimension.
        prefix: 0-dim int32; the bits from ``shift + width`` up.
        shift: number of bits below the digit.
        width: number of bits of the digit, at most 8.
    """
    n = values.numel()
    if n:
        grid = (min(_MAX_PROGRAMS, triton.cdiv(n, _BLOCK)),)
        with torch.cuda.device_of(values):
            _histogram_kernel[grid](values, n, prefix, histogram, SHIFT=shift, WIDTH=width, BLOCK=_BLOCK)

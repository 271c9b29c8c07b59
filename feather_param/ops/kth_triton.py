"""The Triton kernel behind the k-th magnitude on a GPU: a histogram of one digit of the magnitudes."""

# pyright: reportArgumentType=false, reportOperatorIssue=false
# (`tl.constexpr` parameters accept plain numbers, but their annotation does not say so)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # values that a program processes at a time


@triton.jit
def _histogram_kernel(
    values, programs, prefixes, histograms, SHIFT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    own = programs + tl.program_id(0) * 4
    first, end, distance, number = tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3)
    wanted = tl.load(prefixes + number)
    bins = tl.arange(0, 256)
    counts = tl.zeros([256], tl.int32)
    others = tl.zeros([BLOCK], tl.int32)  # lanes whose element is not to be counted
    for start in range(first, end, distance):
        at = start + tl.arange(0, BLOCK)
        there = at < end
        bits = tl.load(values + at, mask=there, other=0.0).to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        counted = there & ((bits >> (SHIFT + WIDTH)) == wanted)
        digit = (bits >> SHIFT) & (2**WIDTH - 1)
        counts += tl.histogram(tl.where(counted, digit, 0), 256)
        others += 1 - counted.to(tl.int32)
    counts -= tl.where(bins == 0, tl.sum(others, axis=0), 0)  # these lanes were counted in the first bin
    tl.atomic_add(histograms + number * 256 + bins, counts.to(tl.int64))


def add_histograms(
    histograms: Tensor, values: Tensor, programs: Tensor, prefixes: Tensor, shift: int, width: int
) -> None:
    """Count in each set the magnitudes that begin with its prefix, by the digit that follows the prefix.

    A magnitude is the bit pattern of ``|value|`` as float32, an integer of 31 bits.

    Args:
        histograms: int64 of shape (sets, 256); the counts are added to it.
        values: float32, float16 or bfloat16, contiguous, of one dimension; the sets one after the other.
        programs: int64 of shape (programs, 4): the first index of a program, the end of its set, the distance to its
            next index, and the number of its set. It processes `BLOCK` values from each index on.
        prefixes: int32 of shape (sets,); the bits from ``shift + width`` up.
        shift: number of bits below the digit.
        width: number of bits of the digit, at most 8.
    """
    if len(programs):
        with torch.cuda.device_of(values):
            _histogram_kernel[(len(programs),)](
                values, programs, prefixes, histograms, SHIFT=shift, WIDTH=width, BLOCK=BLOCK
            )

"""Triton kernels: what a GPU does in one pass where torch's own operations take many.

Imported where a weight lies on a GPU; needs `triton`, which comes with torch's CUDA builds, and the C compiler and the
GPU that triton needs. Without them, the same numbers come from torch's operations, with several times the memory
traffic.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false
# (a `tl.constexpr` parameter takes plain numbers, which its annotation does not say)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def serves(weight: Tensor, p: float) -> bool:
    """Return whether `shrink` knows the dtype and the exponent."""
    return weight.dtype in (torch.float32, torch.float16, torch.bfloat16) and p in (1.0, 2.0, 3.0, math.inf)


@triton.jit
def _shrink_kernel(weight, threshold, out, pruned, n, P: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < n
    w = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    t = tl.load(threshold)
    magnitude = tl.abs(w)
    gone = magnitude <= t  # a NaN is not: it must stay visible
    if P == 0:  # infinity
        value = w
    else:
        # Up to triton 3.4 the division takes subnormal numbers for 0: there 1, which keeps them as they are, not 0 / 0.
        u = tl.where(magnitude < 1.1754943508222875e-38, 1.0, tl.div_rn(magnitude - t, magnitude))
        if P == 1:
            factor = u
        elif P == 2:
            factor = tl.sqrt_rn((2.0 - u) * u)
        else:
            cube = u * (3.0 - u * (3.0 - u))
            root = tl.exp2(tl.log2(cube) * 0.3333333333333333)
            factor = root - (root - tl.div_rn(cube, root * root)) * 0.3333333333333333  # one step of Newton's
        value = factor * w
    tl.store(out + at, tl.where(gone, 0.0, value), mask=there)  # rounded to the dtype of `out`
    if MASKED:
        tl.store(pruned + at, gone, mask=there)


def shrink(weight: Tensor, threshold: Tensor, p: float, out: Tensor, pruned: Tensor | None) -> None:
    """Write P(weight), and the mask of what it sets to zero where there is one; all contiguous, of one dimension."""
    n = weight.numel()
    if n:
        with torch.cuda.device_of(weight):
            _shrink_kernel[(triton.cdiv(n, _BLOCK),)](
                weight,
                threshold,
                out,
                out if pruned is None else pruned,
                n,
                P=0 if p == math.inf else int(p),
                MASKED=pruned is not None,
                BLOCK=_BLOCK,
            )

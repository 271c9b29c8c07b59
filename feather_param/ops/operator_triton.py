"""The operator on a GPU, as one Triton kernel.

`operator` computes the same with torch's operations, which move several times as much memory. The kernel needs triton,
which comes with the CUDA builds of torch, a C compiler, and a GPU that triton supports.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false
# (`tl.constexpr` parameters accept plain numbers, but their annotation does not say so)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def supports(weight: Tensor) -> bool:
    """Return whether `shrink` supports the dtype of the weight."""
    return weight.dtype in (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _shrink_kernel(weight, threshold, out, pruned, n, P: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < n
    w = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    t = tl.load(threshold)
    magnitude = tl.abs(w)
    gone = magnitude <= t  # False for a NaN, which must stay visible
    if P == 0:  # p = infinity
        value = w
    else:
        # u and the factor are explained in `operator`, Note [Factor].
        # Up to triton 3.4, division treats subnormal numbers as 0, and 0 / 0 is NaN. u = 1 keeps them.
        u = tl.where(magnitude < 1.1754943508222875e-38, 1.0, tl.div_rn(magnitude - t, magnitude))
        if P == 0.5:
            quotient = tl.where(magnitude < 1.1754943508222875e-38, 0.0, tl.div_rn(t, magnitude))
            root = tl.div_rn(u, 1.0 + tl.sqrt_rn(quotient))
            factor = root * root
        elif P == 1:
            factor = u
        elif P == 2:
            factor = tl.sqrt_rn((2.0 - u) * u)
        elif P == 3:
            cube = u * (3.0 - u * (3.0 - u))
            root = tl.exp2(tl.log2(cube) * 0.3333333333333333)
            factor = root - (root - tl.div_rn(cube, root * root)) * 0.3333333333333333  # one Newton step
        else:  # in float64, since the power 1 / P multiplies the error
            quotient = t.to(tl.float64) / tl.where(gone, 1.0, magnitude).to(tl.float64)
            whole = quotient == 0.0
            power = tl.exp(P * tl.log(tl.where(gone | whole, 0.5, quotient)))  # (t / |w|)^P
            factor = tl.where(whole, 1.0, tl.exp(tl.log(1.0 - power) / P)).to(tl.float32)
        value = factor * w
    tl.store(out + at, tl.where(gone, 0.0, value), mask=there)  # rounded to the dtype of `out`
    if MASKED:
        tl.store(pruned + at, gone, mask=there)


def shrink(weight: Tensor, threshold: Tensor, p: float, out: Tensor, pruned: Tensor | None) -> None:
    """Write P(weight) into `out` and, unless it is None, the mask of the pruned elements into `pruned`.

    All tensors but the threshold are contiguous and of one dimension. The threshold is a 0-dim float32 tensor on the
    same device. ``out`` has the dtype of the weight, ``pruned`` is bool.
    """
    n = weight.numel()
    if n:
        with torch.cuda.device_of(weight):
            _shrink_kernel[(triton.cdiv(n, _BLOCK),)](
                weight,
                threshold,
                out,
                out if pruned is None else pruned,
                n,
                P=0 if p == math.inf else p,
                MASKED=pruned is not None,
                BLOCK=_BLOCK,
            )

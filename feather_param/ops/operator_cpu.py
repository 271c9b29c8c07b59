"""The operator on a CPU: what survives is found, computed and put back between zeros.

The root in P(w) takes most of the time, and at a rate of 95 % nineteen of twenty would be taken in vain. It is numpy
that finds the survivors faster than torch, has a cube root, and costs less where a layer is small and the caches are
full of something else. Its shapes depend on the values, so compiled graphs and other devices, where that would mean
waiting, compute everything.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feather_param.ops.dtypes import INTEGER
from feather_param.ops.threads import in_threads

# Elements handled at a time, so that what is made of them stays in the cache (`benchmarks.operator`).
_CHUNK = 1 << 17

Bits = NDArray[np.signedinteger[Any]]
Floats = NDArray[np.floating[Any]]


def serves(weight: Tensor) -> bool:
    """Return whether `shrink` knows the dtype."""
    return weight.dtype in INTEGER


def shrink(weight: Tensor, threshold: Tensor, p: float, out: Tensor, pruned: Tensor | None) -> None:
    """Compute the operator, in float32 at least, and the mask of what it sets to zero.

    Args:
        weight: float64, float32, float16 or bfloat16, on the CPU, of any strides without gaps.
        threshold: 0-dim.
        p: exponent.
        out: where the result goes, of the weight's dtype and strides.
        pruned: where the mask goes, bool, of the weight's strides; or None.
    """
    t = (np.float64 if weight.dtype == torch.float64 else np.float32)(threshold.item())
    # Numpy sees what is ours only: a storage that it has seen cannot be resized any more, as FSDP does with weights.
    torch.hardshrink(weight, _largest_pruned(t, weight.dtype), out=out)  # a NaN is kept: it must stay visible
    if math.isnan(t):  # a sick weight elsewhere: prune nothing, and let it be seen
        if p != math.inf:
            out.fill_(math.nan)
        if pruned is not None:
            pruned.zero_()
        return
    bits = out.view(INTEGER[out.dtype]).numpy().ravel("K")  # views: there are no gaps
    mask = None if pruned is None else pruned.numpy().ravel("K")

    def work(thread: int, threads: int) -> None:
        with np.errstate(all="ignore"):  # NaN and infinity pass through
            for start in range(_CHUNK * thread, bits.size, _CHUNK * threads):
                part = slice(start, start + _CHUNK)
                _move(bits[part], t, p, weight.dtype, None if mask is None else mask[part])

    in_threads(work, bits.size if weight.element_size() >= 4 else 0)  # 16 bits are converted by torch


def _largest_pruned(threshold: np.floating[Any], dtype: torch.dtype) -> float:
    """Return the largest number of a dtype up to the threshold: it cuts the numbers of that dtype at the same place."""
    if dtype == torch.bfloat16:
        return float((threshold.view(np.int32) & -(1 << 16)).view(np.float32))
    if dtype == torch.float16:
        with np.errstate(all="ignore"):
            half = threshold.astype(np.float16)
        return float(np.nextafter(half, np.float16(0)) if half > threshold else half)
    return float(threshold)


def _move(bits: Bits, t: np.floating[Any], p: float, dtype: torch.dtype, pruned: NDArray[np.bool_] | None) -> None:
    """Replace what is not zero by P(w), and write the mask of what is."""
    kept = bits != 0
    if pruned is not None:
        np.logical_not(kept, out=pruned)
    if p == math.inf or t == 0:  # what is kept stays as it is
        return
    index = np.flatnonzero(kept)
    survivors = bits[index]
    if dtype in (torch.float32, torch.float64):
        moved = _moved(survivors.view(t.dtype), t, p).view(bits.dtype)
    else:  # by torch, for numpy has no bfloat16
        wide = torch.from_numpy(survivors).view(dtype).float().numpy()
        moved = torch.from_numpy(_moved(wide, t, p)).to(dtype).view(INTEGER[dtype]).numpy()
    bits[index] = moved


def _moved(survivors: Floats, t: np.floating[Any], p: float) -> Floats:
    """Return P(w) of what is not pruned."""
    magnitude = np.abs(survivors)
    u = magnitude - t
    u /= magnitude
    factor = _factor(u, p)
    factor *= survivors
    return factor


def _factor(u: Floats, p: float) -> Floats:
    """Return (1 - (1 - u)^p)^(1/p) for u in (0, 1]."""
    if p == 1.0:
        return u
    if p == 2.0:
        factor = 2.0 - u
        factor *= u
        return np.sqrt(factor, out=factor)
    if p == 3.0:
        factor = u - 3.0
        factor *= u
        factor += 3.0
        factor *= u
        return np.cbrt(factor, out=factor)
    factor = np.log1p(-u)
    factor *= p
    np.expm1(factor, out=factor)
    np.negative(factor, out=factor)
    factor **= 1.0 / p
    return factor

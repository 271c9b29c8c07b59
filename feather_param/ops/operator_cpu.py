"""The operator on a CPU, with numpy: it finds the elements that are kept, and computes P(w) of these only.

The root in P(w) takes most of the time, and at a rate of 95 % only one element in twenty needs it. Numpy finds the kept
elements faster than torch, has a cube root, and is faster on small layers. The number of kept elements depends on the
values. So compiled graphs cannot do this, and a GPU would have to wait: `operator` computes all elements there.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feather_param.ops.dtypes import INTEGER, Bits
from feather_param.ops.threads import in_threads

# Number of elements that are processed at a time, so that the intermediate results stay in the cache
# (`benchmarks.operator`).
_CHUNK = 1 << 17

# The exponents for which the factor is exact enough in float32, see Note [Factor] in `operator`.
SIMPLE = (0.5, 1.0, 2.0, 3.0)

Floats = NDArray[np.floating[Any]]


def supports(weight: Tensor) -> bool:
    """Return whether `shrink` supports the dtype of the weight."""
    return weight.dtype in INTEGER


def shrink(weight: Tensor, threshold: Tensor, p: float, out: Tensor, pruned: Tensor | None) -> None:
    """Write P(weight), computed in float32 or float64, into `out`, and the mask of the pruned elements into `pruned`.

    Args:
        weight: float64, float32, float16 or bfloat16, on the CPU, of any strides without gaps.
        threshold: 0-dim.
        p: exponent.
        out: of the weight's dtype and strides.
        pruned: bool, of the weight's strides; or None.
    """
    t = (np.float64 if weight.dtype == torch.float64 else np.float32)(threshold.item())
    # Numpy gets no view of the weight: it would keep FSDP from resizing the weight's storage.
    torch.hardshrink(weight, _largest_pruned(t, weight.dtype), out=out)  # a NaN is kept: it must stay visible
    if math.isnan(t):  # some weight of the model is not finite: nothing is pruned, and the result shows it
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

    # Torch converts 16-bit numbers, in threads of its own, so one thread of ours is enough.
    in_threads(work, bits.size if weight.element_size() >= 4 else 0)


def _largest_pruned(threshold: np.floating[Any], dtype: torch.dtype) -> float:
    """Return the threshold rounded down to a dtype.

    Rounding does not change which numbers of this dtype are above it.
    """
    if dtype == torch.bfloat16:
        return float((threshold.view(np.int32) & -(1 << 16)).view(np.float32))
    if dtype == torch.float16:
        with np.errstate(all="ignore"):
            half = threshold.astype(np.float16)
        return float(np.nextafter(half, np.float16(0)) if half > threshold else half)
    return float(threshold)


def _move(bits: Bits, t: np.floating[Any], p: float, dtype: torch.dtype, pruned: NDArray[np.bool_] | None) -> None:
    """Replace the numbers that are not zero by P(w), and write the mask of the others."""
    kept = bits != 0
    if pruned is not None:
        np.logical_not(kept, out=pruned)
    if p == math.inf or t == 0:  # P(w) = w
        return
    index = np.flatnonzero(kept)
    chosen = bits[index]
    if dtype in (torch.float32, torch.float64):
        moved = _moved(chosen.view(t.dtype), t, p).view(bits.dtype)
    else:  # numpy has no bfloat16, so torch converts
        wide = torch.from_numpy(chosen).view(dtype).float().numpy()
        moved = torch.from_numpy(_moved(wide, t, p)).to(dtype).view(INTEGER[dtype]).numpy()
    bits[index] = moved


def _moved(kept: Floats, t: np.floating[Any], p: float) -> Floats:
    """Return P(w) of kept elements."""
    magnitude = np.abs(kept, dtype=kept.dtype if p in SIMPLE else np.float64)
    factor = _factor(magnitude, t, p)
    factor *= kept
    return factor.astype(kept.dtype, copy=False)


def _factor(magnitude: Floats, t: np.floating[Any] | Floats, p: float) -> Floats:
    """Return P(w) / w of kept elements, see Note [Factor] in `operator`."""
    u = magnitude - t
    u /= magnitude
    if p == 0.5:
        factor = t / magnitude
        np.sqrt(factor, out=factor)
        factor += 1.0
        np.divide(u, factor, out=factor)
        return np.square(factor, out=factor)
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
    factor = np.where(u < 0.5, np.log1p(-u), np.log(t / magnitude))
    factor *= p
    np.expm1(factor, out=factor)
    np.negative(factor, out=factor)
    factor **= 1.0 / p
    return factor

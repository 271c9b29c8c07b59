"""The k-th magnitude on a CPU, by a bracket around it.

A sample of the magnitudes gives the bracket. One pass counts the magnitudes below the bracket and collects those
inside, which are few. The k-th of all is then found among these. If the bracket misses it, all magnitudes are searched:
that takes longer, and the result is as exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from feather_param.ops.dtypes import INFINITY_BITS, INTEGER, Bits, as_threshold, common_dtype, flat
from feather_param.ops.threads import in_threads

# Number of elements that a thread processes at a time, so that the intermediate results stay in the cache.
_CHUNK = 1 << 18
# Size of the sample that gives the bracket.
_SAMPLE = 1 << 14


def kth_by_bracket(tensors: Sequence[Tensor], k: int) -> tuple[Tensor, bool]:
    """Return the k-th smallest magnitude, and whether all are finite; if not, the magnitude is meaningless."""
    dtype = common_dtype(tensors)
    # `Tensor.numpy` would keep FSDP from resizing the storage of the tensor.
    views: list[Any] = [np.from_dlpack(flat(tensor.to("cpu", dtype)).view(INTEGER[dtype])) for tensor in tensors]
    bits: list[Bits] = views
    total = sum(part.size for part in bits)
    if k == 0:
        low, high = 0, -1  # empty: the scan only checks that all are finite
    elif total <= 4 * _SAMPLE:
        low, high = 0, INFINITY_BITS[dtype]
    else:
        low, high = _bracket(bits, k, total)
    chunks = [part[i : i + _CHUNK] for part in bits for i in range(0, part.size, _CHUNK)]
    scans = in_threads(lambda i, threads: _scan(chunks[i::threads], low, high), total)
    finite = max(scan.largest for scan in scans) < INFINITY_BITS[dtype]
    if k == 0:
        return as_threshold(torch.zeros((), dtype=dtype)), finite
    below = sum(scan.below for scan in scans)
    if low == high and below < k <= below + sum(scan.equal for scan in scans):  # many ties, or many zeros
        return as_threshold(torch.from_numpy(np.full(1, low, bits[0].dtype)).view(dtype)[0]), finite
    parts = [part for scan in scans for part in scan.inside]
    inside = np.concatenate(parts) if parts else bits[0][:0]
    if not below < k <= below + inside.size:  # the bracket missed
        below, inside = 0, np.concatenate(bits) & _magnitude_mask(bits[0])
    inside.partition(k - below - 1)
    return as_threshold(torch.from_numpy(inside[k - below - 1 : k - below]).view(dtype)[0]), finite


def _bracket(bits: Sequence[Bits], k: int, total: int) -> tuple[int, int]:
    """Return bounds that contain the k-th magnitude with high probability: five standard deviations on each side."""
    stride = total // _SAMPLE
    while math.gcd(stride, 210) > 1:  # no common period with the sizes of kernels and channels
        stride += 1
    parts: list[Bits] = []
    start = 0
    for part in bits:
        parts.append(part[-start % stride :: stride])
        start += part.size
    sample = np.sort(np.concatenate(parts) & _magnitude_mask(bits[0]))
    fraction = k / total
    spread = 5.0 * math.sqrt(sample.size * fraction * (1.0 - fraction)) + 2.0
    first, last = math.floor(fraction * sample.size - spread), math.ceil(fraction * sample.size + spread)
    low = int(sample[first]) if first > 0 else 0
    return low, int(sample[last]) if last < sample.size else _magnitude_mask(bits[0])


class _Scan(NamedTuple):
    """The result of a pass over some magnitudes, compared with a bracket."""

    below: int  # number of magnitudes below the bracket
    equal: int  # if the bracket is a single number: number of magnitudes that equal it
    inside: list[Bits]  # otherwise: the magnitudes inside the bracket
    largest: int  # the largest of all magnitudes


def _scan(chunks: Sequence[Bits], low: int, high: int) -> _Scan:
    """Compare magnitudes with the bracket from `low` to `high`, both included."""
    below, equal, inside, largest = 0, 0, [], 0
    if not chunks:
        return _Scan(below, equal, inside, largest)
    buffer = np.empty(_CHUNK, chunks[0].dtype)
    masks = np.empty((2, _CHUNK), np.bool_)
    for chunk in chunks:
        n = chunk.size
        magnitude = np.bitwise_and(chunk, _magnitude_mask(chunk), out=buffer[:n])
        above = np.greater_equal(magnitude, low, out=masks[0, :n])
        below += n - int(np.count_nonzero(above))
        np.logical_and(above, np.less_equal(magnitude, high, out=masks[1, :n]), out=above)
        if low < high:
            inside.append(magnitude[np.flatnonzero(above)])
        else:
            equal += int(np.count_nonzero(above))
        largest = max(largest, int(magnitude.max()))
    return _Scan(below, equal, inside, largest)


def _magnitude_mask(bits: Bits) -> int:
    """Return the integer whose bitwise AND with a number's bits clears the sign."""
    return int(np.iinfo(bits.dtype).max)

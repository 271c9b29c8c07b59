"""The k-th magnitude on a CPU, by a bracket around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feather_param.ops.dtypes import INFINITY_BITS, INTEGER, flat
from feather_param.ops.threads import in_threads

Bits = NDArray[np.signedinteger[Any]]

# Elements that a thread handles at a time: what it makes of them stays in the cache.
_CHUNK = 1 << 18
# Size of the sample from which the bracket around the k-th magnitude is guessed.
_SAMPLE = 1 << 14


def kth_by_bracket(tensors: Sequence[Tensor], k: int) -> tuple[Tensor, bool]:
    """Return the k-th smallest magnitude on the CPU, and whether all are finite (if not, it means nothing)."""
    dtype = common_dtype(tensors)
    bits: list[Bits] = [flat(tensor.to("cpu", dtype)).view(INTEGER[dtype]).numpy() for tensor in tensors]
    total = sum(part.size for part in bits)
    low, high = (0, -1) if k == 0 else (0, INFINITY_BITS[dtype]) if total <= 4 * _SAMPLE else _bracket(bits, k, total)
    chunks = [part[i : i + _CHUNK] for part in bits for i in range(0, part.size, _CHUNK)]
    scans = in_threads(lambda i, threads: _scan(chunks[i::threads], low, high), total)
    finite = max(largest for *_, largest in scans) < INFINITY_BITS[dtype]
    if k == 0:
        return _as_threshold(torch.zeros((), dtype=dtype)), finite
    below = sum(scan[0] for scan in scans)
    if low == high and below < k <= below + sum(scan[1] for scan in scans):  # ties all over, or many zeros
        return _as_threshold(torch.from_numpy(np.full(1, low, bits[0].dtype)).view(dtype)[0]), finite
    parts = [part for _, _, inner, _ in scans for part in inner]
    inside = np.concatenate(parts) if parts else bits[0][:0]
    if not below < k <= below + inside.size:
        below, inside = 0, np.concatenate(bits) & _magnitude(bits[0])
    inside.partition(k - below - 1)
    return _as_threshold(torch.from_numpy(inside[k - below - 1 : k - below]).view(dtype)[0]), finite


def _magnitude(bits: Bits) -> int:
    """Return the mask that takes the sign off."""
    return int(np.iinfo(bits.dtype).max)


def _bracket(bits: Sequence[Bits], k: int, total: int) -> tuple[int, int]:
    """Return bounds between which the k-th magnitude lies, judging by a sample: five standard deviations each way."""
    stride = total // _SAMPLE
    while math.gcd(stride, 210) > 1:  # out of step with kernels and channels
        stride += 1
    parts: list[Bits] = []
    start = 0
    for part in bits:
        parts.append(part[-start % stride :: stride])
        start += part.size
    sample = np.sort(np.concatenate(parts) & _magnitude(bits[0]))
    share = k / total
    spread = 5.0 * math.sqrt(sample.size * share * (1.0 - share)) + 2.0
    first, last = math.floor(share * sample.size - spread), math.ceil(share * sample.size + spread)
    low = int(sample[first]) if first > 0 else 0
    return low, int(sample[last]) if last < sample.size else _magnitude(bits[0])


def _scan(chunks: Sequence[Bits], low: int, high: int) -> tuple[int, int, list[Bits], int]:
    """Return how many magnitudes lie below `low`, those from `low` to `high`, and the largest of all."""
    below, found, inside, largest = 0, 0, [], 0
    if not chunks:
        return below, found, inside, largest
    buffer = np.empty(_CHUNK, chunks[0].dtype)
    masks = np.empty((2, _CHUNK), np.bool_)
    for chunk in chunks:
        n = chunk.size
        magnitude = np.bitwise_and(chunk, _magnitude(chunk), out=buffer[:n])
        above = np.greater_equal(magnitude, low, out=masks[0, :n])
        below += n - int(np.count_nonzero(above))
        np.logical_and(above, np.less_equal(magnitude, high, out=masks[1, :n]), out=above)
        if low < high:
            inside.append(magnitude[np.flatnonzero(above)])
        else:
            found += int(np.count_nonzero(above))
        largest = max(largest, int(magnitude.max()))
    return below, found, inside, largest


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype in which magnitudes are ranked: that of all the tensors, or one that holds them all."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1 and dtypes <= INTEGER.keys():
        return dtypes.pop()
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _as_threshold(kth: Tensor) -> Tensor:
    """Return a magnitude in the precision of a threshold."""
    return kth if kth.dtype == torch.float64 else kth.float()

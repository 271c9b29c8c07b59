"""Exact order statistics of the magnitudes of many tensors together.

A magnitude is ``|w|`` in the precision in which the operator compares: float64 if a weight has it, else float32.
Non-negative floats order like their bit patterns read as integers, so magnitudes are ranked as integers.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feather_param.threads import in_threads

Bits = NDArray[np.signedinteger[Any]]

Sum = Callable[[Tensor], Tensor]
"""Adds up a tensor of counts over the processes that hold the parts of the weights."""

# The integers that hold a dtype's bits.
INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
_INFINITY = {  # only NaNs lie above
    torch.float64: 0x7FF0000000000000,
    torch.float32: 0x7F800000,
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
}

# Elements that a thread handles at a time: what it makes of them stays in the cache.
_CHUNK = 1 << 18
# Size of the sample from which the bracket around the k-th magnitude is guessed.
_SAMPLE = 1 << 14


def kth_magnitude(weights: Mapping[str, Tensor], k: int, add_up: Sum | None = None) -> Tensor:
    """Return the exact k-th smallest magnitude of all the weights together.

    On a CPU it costs about two passes over the weights and hardly any memory: a sample gives a narrow bracket around
    the k-th magnitude, one pass counts what lies below and collects what lies inside, and that is ranked. A bracket
    that misses costs time but not exactness. Elsewhere, and over several processes, it is found by counting, without
    waiting for the device, digit by digit on a GPU with triton, else bit by bit; NaN or infinity on another device than
    the CPU gives NaN instead of an error.

    Args:
        weights: tensors by name, of any shape, floating dtype, memory format and device.
        k: 1 for the smallest; 0 gives 0.
        add_up: where each process holds a part of the weights, sums counts over the processes: 4 times 256 numbers
            on a GPU with triton, else 32 times one. All get the same result, or the same error.

    Returns:
        A 0-dim tensor on the device of the first weight; float64 if a weight is, else float32.

    Raises:
        ValueError: a weight on a CPU holds NaN or infinity; the message names it, if it is this process's.

    Example:
        >>> kth_magnitude({"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([[-2.0]])}, 2)
        tensor(2.)
    """
    tensors = [weight.detach() for weight in weights.values()]
    total = sum(tensor.numel() for tensor in tensors)
    if not 0 <= k <= total and add_up is None:
        raise ValueError(f"expected k between 0 and the number of weights, {total}, got {k}")
    on_cpu = tensors[0].device.type == "cpu"
    if on_cpu and add_up is None:
        kth, finite = _kth_by_bracket(tensors, k)
    else:
        by_digits = tensors[0].is_cuda and _ranked(tensors) != torch.float64 and kernels(tensors[0].device)
        count = _kth_by_digits if by_digits else _kth_by_bits
        kth = count(tensors, k, add_up or (lambda counts: counts))
        finite = not on_cpu or not kth.isnan()
    if not finite:
        refuse_non_finite(weights, elsewhere=add_up is not None)
    return kth


def require_finite(weights: Mapping[str, Tensor], add_up: Sum | None = None, new: bool = False) -> None:
    """Raise `refuse_non_finite`'s error if some weight holds NaN or infinity; all processes call this."""
    held = [weight.detach() for weight in weights.values() if not weight.is_meta]
    if not held:
        return
    bad = torch.stack([(~weight.isfinite()).sum().cpu() for weight in held]).sum()
    if add_up is not None:
        bad = add_up(bad.to(next(iter(weights.values())).device))
    if bad:
        refuse_non_finite(weights, elsewhere=add_up is not None, new=new)


def refuse_non_finite(weights: Mapping[str, Tensor], elsewhere: bool = False, new: bool = False) -> None:
    """Raise the error that names the weights with NaN or infinity, if any or some `elsewhere`; waits for the device.

    Args:
        weights: tensors by name.
        elsewhere: whether another process may hold them.
        new: whether these weights have yet to be trained, and no training can be to blame.
    """
    names = [name for name, weight in weights.items() if not weight.detach().isfinite().all()]
    if names or elsewhere:
        found = ", ".join(names) or "a part that another process holds"
        advice = (
            "check the initialisation, or the checkpoint that they come from"
            if new
            else "the training has diverged: go back to the last checkpoint and lower the learning rate, or clip the "
            "gradients"
        )
        raise ValueError(f"expected finite weights, got NaN or infinity in {found}; {advice}")


def _ranked(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype in which magnitudes are ranked: that of all the tensors, or one that holds them all."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1 and dtypes <= INTEGER.keys():
        return dtypes.pop()
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _as_threshold(kth: Tensor) -> Tensor:
    """Return a magnitude in the precision of a threshold."""
    return kth if kth.dtype == torch.float64 else kth.float()


def flat(tensor: Tensor) -> Tensor:
    """Return a tensor's elements in the order of its memory, as a view where there are no gaps in it."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)


def _kth_by_bracket(tensors: Sequence[Tensor], k: int) -> tuple[Tensor, bool]:
    """Return the k-th smallest magnitude on the CPU, and whether all are finite (if not, it means nothing)."""
    dtype = _ranked(tensors)
    bits: list[Bits] = [flat(tensor.to("cpu", dtype)).view(INTEGER[dtype]).numpy() for tensor in tensors]
    total = sum(part.size for part in bits)
    low, high = (0, -1) if k == 0 else (0, _INFINITY[dtype]) if total <= 4 * _SAMPLE else _bracket(bits, k, total)
    chunks = [part[i : i + _CHUNK] for part in bits for i in range(0, part.size, _CHUNK)]
    scans = in_threads(lambda i, threads: _scan(chunks[i::threads], low, high), total)
    finite = max(largest for *_, largest in scans) < _INFINITY[dtype]
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


@cache
def kernels(device: torch.device) -> ModuleType | None:
    """Return our GPU kernels, if they run on a device: each is compiled there, and tried on one element.

    Triton may be missing, or the C compiler that it calls (images with no more than what running takes have none), or
    it may not know the GPU, or not its bfloat16; it has an exception of another type for each.
    """
    try:
        module = importlib.import_module("feather_param.kernels")
        one = torch.ones(1, dtype=torch.bfloat16, device=device)
        module.add_histogram(
            torch.zeros(256, dtype=torch.int64, device=device), one, one.new_zeros((), dtype=torch.int32), 23, 8
        )
        module.shrink(one, one[0].float(), math.inf, one, None)
    except Exception:
        return None
    return module


# Widths and places of the digits of a magnitude's 31 bits, from the exponent down.
_DIGITS = ((8, 23), (8, 15), (8, 7), (7, 0))


def _kth_by_digits(tensors: Sequence[Tensor], k: int, add_up: Sum) -> Tensor:
    """Return the k-th smallest magnitude without waiting for the device; NaN if something is not finite.

    A histogram of the first digits tells the first digit, one of those that begin with it the second, and so on.
    """
    device = tensors[0].device
    dtype = _ranked(tensors)
    values = torch.cat([flat(tensor.to(device, dtype)) for tensor in tensors])
    prefix = torch.zeros((), dtype=torch.int32, device=device)
    rank = torch.full((), k, dtype=torch.int64, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    for width, shift in _DIGITS if k else _DIGITS[:1]:  # what stands below them all is 0
        histogram = torch.zeros(256, dtype=torch.int64, device=device)
        kernels(device).add_histogram(histogram, values, prefix, shift, width)  # type: ignore[union-attr]
        histogram = add_up(histogram)
        if shift == _DIGITS[0][1]:
            finite = histogram[-1] == 0  # the largest exponent is that of infinity and NaN
        up_to = histogram.cumsum(0)
        digit = (up_to < rank).sum()
        rank = rank - (up_to - histogram).gather(0, digit.view(1)).view(())
        prefix = (prefix << width) | digit.to(torch.int32)
    return torch.where(finite, prefix.view(torch.float32), math.nan)


def _kth_by_bits(tensors: Sequence[Tensor], k: int, add_up: Sum) -> Tensor:
    """Return the k-th smallest magnitude without waiting for the device; NaN if something is not finite.

    It is the largest number that has fewer than k magnitudes below it, and is built from its highest bit down.
    """
    device = tensors[0].device
    dtype = torch.float64 if _ranked(tensors) == torch.float64 else torch.float32
    bits = torch.cat([flat(tensor.to(device, dtype)) for tensor in tensors]).abs_().view(INTEGER[dtype])
    kth = torch.zeros((), dtype=INTEGER[dtype], device=device)
    for bit in reversed(range(8 * kth.element_size() - 1 if k else 0)):
        candidate = kth + (1 << bit)
        kth = torch.where(add_up((bits < candidate).sum()) < k, candidate, kth)
    finite = add_up((bits >= _INFINITY[dtype]).sum()) == 0
    return torch.where(finite, kth.view(dtype), torch.full((), math.nan, dtype=dtype, device=device))


@dataclass(frozen=True)
class PruneCount:
    """How many elements of one weight are pruned, and how many others equal the threshold: the operator cuts these."""

    zeros: int
    ties: int = 0


def count_pruned(
    weights: Mapping[str, Tensor], threshold: Tensor, k: int, add_up: Sum | None = None
) -> dict[str, PruneCount]:
    """Count what pruning the k smallest magnitudes takes from each tensor.

    All magnitudes below the threshold go; of those equal to it the first ones, in the order of the mapping and
    of each tensor's elements, until k are gone. With a zero threshold every zero counts, even beyond k.

    Args:
        weights: tensors by name.
        threshold: the k-th smallest magnitude, as `kth_magnitude` gives it.
        k: number of weights to prune.
        add_up: as in `kth_magnitude`; the counts are then those of the whole weights.

    Example:
        >>> count_pruned({"a": torch.ones(2), "b": torch.ones(2)}, torch.tensor(1.0), 3)
        {'a': PruneCount(zeros=2, ties=0), 'b': PruneCount(zeros=1, ties=1)}
    """
    found: list[Tensor] = []
    for weight in weights.values():
        magnitude = weight.detach().abs().to(threshold.dtype)
        t = threshold.to(magnitude.device)
        found += [(magnitude < t).sum(), (magnitude == t).sum()]
    counted = torch.stack([count.to(threshold.device) for count in found]) if found else torch.zeros(0)
    values = (add_up(counted) if add_up else counted).tolist()
    below, equal = dict(zip(weights, values[::2], strict=True)), dict(zip(weights, values[1::2], strict=True))
    quota = sum(equal.values()) if threshold == 0 else k - sum(below.values())
    counts: dict[str, PruneCount] = {}
    for name in weights:
        pruned = max(0, min(equal[name], quota))
        quota -= pruned
        counts[name] = PruneCount(below[name] + pruned, equal[name] - pruned)
    return counts

"""The k-th magnitude on a GPU, and of weights that are sharded over processes: by counting magnitudes.

Nothing here waits for the device, and processes exchange counts only. With Triton the magnitude is found digit by digit
(`kth_by_digits`, whose kernel is in `kth_triton`), otherwise bit by bit (`kth_by_bits`, which runs on any device).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from feather_param.ops.distributed import Sum
from feather_param.ops.dtypes import INFINITY_BITS, INTEGER, common_dtype, flat

# Width and lowest bit of each digit of a float32 magnitude, a number of 31 bits. The first digit is the exponent.
_DIGITS = ((8, 23), (8, 15), (8, 7), (7, 0))


def kth_by_digits(sets: Sequence[Sequence[Tensor]], ks: Sequence[int] | Tensor, add_up: Sum, gpu: ModuleType) -> Tensor:
    """Return the k-th smallest magnitude of each set of tensors; NaN if an element of the set is not finite.

    A histogram of the first digit of all magnitudes gives the first digit of the result. A histogram of the second
    digit, of the magnitudes that begin with this first digit, gives the second digit, and so on. The sets are searched
    side by side, so `add_up` is called once for a digit.

    Args:
        sets: the sets of tensors; none is float64.
        ks: for each set, 1 for the smallest magnitude; 0 gives 0. As a tensor, int64 on the device of the first set.
        add_up: as in `kth_magnitude`.
        gpu: the module with the kernel, `kth_triton`.

    Returns:
        float32 of shape (number of sets,).
    """
    device = sets[0][0].device
    everything = [tensor for tensors in sets for tensor in tensors]
    values = _joined(everything, common_dtype(everything))
    programs = _programs(tuple(sum(tensor.numel() for tensor in tensors) for tensors in sets), gpu.BLOCK, device)
    prefixes = torch.zeros(len(sets), dtype=torch.int32, device=device)
    ranks = _on_device(ks, device)  # among the magnitudes that begin with the prefix
    finite = torch.ones(len(sets), dtype=torch.bool, device=device)
    for width, shift in _DIGITS if isinstance(ks, Tensor) or any(ks) else _DIGITS[:1]:  # k = 0: to find NaN
        histograms = torch.zeros(len(sets), 256, dtype=torch.int64, device=device)
        gpu.add_histograms(histograms, values, programs, prefixes, shift, width)
        histograms = add_up(histograms)
        if shift == _DIGITS[0][1]:
            finite = histograms[:, -1] == 0  # infinity and NaN have the largest exponent
        up_to = histograms.cumsum(1)
        digits = (up_to < ranks[:, None]).sum(1)
        ranks = ranks - (up_to - histograms).gather(1, digits[:, None])[:, 0]
        prefixes = (prefixes << width) | digits.to(torch.int32)
    return torch.where(finite, prefixes.view(torch.float32), math.nan)


def kth_by_bits(sets: Sequence[Sequence[Tensor]], ks: Sequence[int] | Tensor, add_up: Sum) -> Tensor:
    """Return the k-th smallest magnitude of each set of tensors; NaN if an element of the set is not finite.

    The result is the largest number that has fewer than k magnitudes below it. It is built from its highest bit down.

    Args:
        sets: the sets of tensors.
        ks: for each set, 1 for the smallest magnitude; 0 gives 0.
        add_up: as in `kth_magnitude`. It is called once for a bit, with a number for each set.

    Returns:
        A tensor of shape (number of sets,), float64 if one of the tensors is, else float32.
    """
    device = sets[0][0].device
    dtype = torch.float64 if any(common_dtype(tensors) == torch.float64 for tensors in sets) else torch.float32
    bits = [_joined(tensors, dtype).abs_().view(INTEGER[dtype]) for tensors in sets]
    kth = torch.zeros(len(sets), dtype=INTEGER[dtype], device=device)
    ranks = _on_device(ks, device)
    for bit in reversed(range(8 * kth.element_size() - 1 if isinstance(ks, Tensor) or any(ks) else 0)):
        candidates = kth + (1 << bit)
        below = torch.stack([(part < bound).sum() for part, bound in zip(bits, candidates, strict=True)])
        kth = torch.where(add_up(below) < ranks, candidates, kth)
    finite = add_up(torch.stack([(part >= INFINITY_BITS[dtype]).sum() for part in bits])) == 0
    return torch.where(finite, kth.view(dtype), math.nan)


def _joined(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the elements of some tensors as a new tensor of one dimension, on the device of the first tensor."""
    device = tensors[0].device
    return torch.cat([flat(tensor.to(device, dtype)) for tensor in tensors])


# The largest number of programs of the kernel, about; each adds a histogram of its own to that of its set.
_MOST_PROGRAMS = 2048


@lru_cache(maxsize=64)
def _programs(sizes: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """Return the work of each program of the kernel, for sets of these sizes that lie one after the other.

    A program processes `block` elements at a time. Large sets have more programs. The result is cached, because a copy
    to a GPU waits for it.

    Returns:
        int64 of shape (programs, 4): first index, end of the set, distance to the next index, number of the set.
    """
    rows, begin, total = [], 0, sum(sizes)
    for number, size in enumerate(sizes):
        count = min(-(-size // block), max(1, _MOST_PROGRAMS * size // max(total, 1)))
        rows += [(begin + i * block, begin + size, count * block, number) for i in range(count)]
        begin += size
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 4)


def _on_device(ks: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Return numbers as int64 on a device. Neither waits for it nor copies to it, so a CUDA graph can record this."""
    if isinstance(ks, Tensor):
        return ks
    return torch.stack([torch.full((), k, dtype=torch.int64, device=device) for k in ks])

"""Exact order statistics of the magnitudes of many tensors together.

A magnitude is ``|w|`` in the precision in which the operator compares: float64 if a weight has it, else float32.
Non-negative floats order like their bit patterns read as integers, so magnitudes are ranked as integers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from feather_param.ops.distributed import Sum
from feather_param.ops.finite import refuse_non_finite
from feather_param.ops.kth_cpu import common_dtype, kth_by_bracket
from feather_param.ops.kth_gpu import kth_by_bits, kth_by_digits
from feather_param.ops.triton import kernels


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
        kth, finite = kth_by_bracket(tensors, k)
    else:
        by_digits = tensors[0].is_cuda and common_dtype(tensors) != torch.float64 and kernels(tensors[0].device)
        count = kth_by_digits if by_digits else kth_by_bits
        kth = count(tensors, k, add_up or (lambda counts: counts))
        finite = not on_cpu or not kth.isnan()
    if not finite:
        refuse_non_finite(weights, elsewhere=add_up is not None)
    return kth

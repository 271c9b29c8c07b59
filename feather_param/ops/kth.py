"""The k-th smallest magnitude of many tensors together, by the fastest method for their device.

`kth_cpu` has the method for CPUs, `kth_gpu` those for GPUs and for weights that are sharded over processes. All are
exact.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from feather_param.ops.distributed import Sum
from feather_param.ops.dtypes import common_dtype
from feather_param.ops.finite import refuse_non_finite
from feather_param.ops.gpu_kernels import kernels
from feather_param.ops.kth_cpu import kth_by_bracket
from feather_param.ops.kth_gpu import kth_by_bits, kth_by_digits


def kth_magnitude(weights: Mapping[str, Tensor], k: int, add_up: Sum | None = None) -> Tensor:
    """Return the exact k-th smallest magnitude of all the weights together.

    On a CPU it costs about two passes over the weights and little memory. On other devices it does not wait for the
    device, so it cannot raise an error for NaN or infinity there: it returns NaN.

    Args:
        weights: tensors by name, of any shape, floating dtype, memory format and device.
        k: 1 for the smallest magnitude; 0 gives 0.
        add_up: if each process holds a part of the weights, sums counts over the processes. It is called with 256
            numbers 4 times on a GPU with Triton, else with one number 32 times (64 in float64). All processes get the
            same result or the same error.

    Returns:
        A 0-dim tensor on the device of the first weight; float64 if a weight is, else float32.

    Raises:
        ValueError: a weight on a CPU holds NaN or infinity. The message names the weight if this process holds it.

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
        total_of = add_up or (lambda counts: counts)
        by_digits = tensors[0].is_cuda and common_dtype(tensors) != torch.float64
        found = kernels(tensors[0].device) if by_digits else None
        kth = kth_by_digits(tensors, k, total_of, found.kth) if found else kth_by_bits(tensors, k, total_of)
        finite = not on_cpu or not kth.isnan()
    if not finite:
        refuse_non_finite(weights, elsewhere=add_up is not None)
    return kth

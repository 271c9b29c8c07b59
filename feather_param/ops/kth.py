"""The k-th smallest magnitude of many tensors together, by the fastest method for their device.

`kth_cpu` has the method for CPUs, `kth_gpu` those for GPUs and for weights that are sharded over processes. All are
exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    return _kth([weights], [k], add_up)[0]


def kth_magnitudes(
    weights: Mapping[str, Tensor], ks: Mapping[str, int], add_up: Sum | None = None
) -> dict[str, Tensor]:
    """Return the exact k-th smallest magnitude of each weight, as `kth_magnitude` does for one.

    The weights are searched side by side, so `add_up` is called as often as for one weight.

    Args:
        weights: as in `kth_magnitude`.
        ks: k for each weight, by name.
        add_up: as in `kth_magnitude`; it is called with a row of numbers for each weight.

    Returns:
        0-dim tensors on the devices of the weights, by name; float64 for float64 weights, else float32.

    Raises:
        ValueError: as in `kth_magnitude`.

    Example:
        >>> kth_magnitudes({"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([-2.0])}, {"a": 2, "b": 0})
        {'a': tensor(3.), 'b': tensor(0.)}
    """
    found = _kth([{name: weight} for name, weight in weights.items()], [ks[name] for name in weights], add_up)
    return dict(zip(weights, found, strict=True))


def _kth(sets: Sequence[Mapping[str, Tensor]], ks: Sequence[int], add_up: Sum | None) -> list[Tensor]:
    """Return the k-th smallest magnitude of each set of weights; a set is not empty."""
    tensors = [[weight.detach() for weight in weights.values()] for weights in sets]
    for own, k in zip(tensors, ks, strict=True):
        total = sum(tensor.numel() for tensor in own)
        if not 0 <= k <= total and add_up is None:
            raise ValueError(f"expected k between 0 and the number of weights, {total}, got {k}")
    batches: dict[tuple[torch.device, bool], list[int]] = {}  # sets that are searched side by side
    for index, own in enumerate(tensors):
        device = next((tensor.device for tensor in own if tensor.is_meta), own[0].device)
        batches.setdefault((device, common_dtype(own) == torch.float64), []).append(index)
    found: dict[int, Tensor] = {}
    finite = True
    for (device, double), indices in batches.items():
        batch, own_ks = [tensors[index] for index in indices], [ks[index] for index in indices]
        if device.type == "meta":
            values = [torch.empty((), dtype=torch.float64 if double else torch.float32, device=device)] * len(batch)
        elif device.type == "cpu" and add_up is None:
            results = [kth_by_bracket(own, k) for own, k in zip(batch, own_ks, strict=True)]
            finite = finite and all(ok for _, ok in results)
            values = [kth for kth, _ in results]
        else:
            gpu = kernels(device) if device.type == "cuda" and not double else None
            total_of = add_up or (lambda counts: counts)
            both = kth_by_digits(batch, own_ks, total_of, gpu.kth) if gpu else kth_by_bits(batch, own_ks, total_of)
            finite = finite and (device.type != "cpu" or not both.isnan().any())
            values = [*both.unbind()]
        found.update(zip(indices, values, strict=True))
    if not finite:
        refuse_non_finite({name: each for own in sets for name, each in own.items()}, elsewhere=add_up is not None)
    return [found[index] for index in range(len(sets))]

"""The number of elements that a threshold prunes in each weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from feather_param.ops.distributed import Sum
from feather_param.ops.dtypes import flat

# Number of elements that a CPU processes at a time, so that the intermediate results stay in the cache.
_CHUNK = 1 << 18


@dataclass(frozen=True)
class PruneCount:
    """The pruned elements of one weight.

    Attributes:
        zeros: number of pruned elements.
        ties: number of kept elements whose magnitude equals the threshold. The operator maps them to zero, but baking
            keeps them.
    """

    zeros: int
    ties: int = 0


def count_above(weight: Tensor, threshold: Tensor) -> Tensor:
    """Return the number of magnitudes above a threshold: int64, 0-dim. It does not wait for a GPU.

    Example:
        >>> count_above(torch.tensor([-3.0, 1.0, 2.0]), torch.tensor(1.0))
        tensor(2)
    """
    weight, t = weight.detach(), threshold.to(weight.device)
    if weight.device.type != "cpu" or weight.numel() <= _CHUNK:
        return torch.count_nonzero(weight.abs().to(t.dtype) > t)
    parts = flat(weight).split(_CHUNK)
    return torch.stack([torch.count_nonzero(part.abs().to(t.dtype) > t) for part in parts]).sum()


def count_pruned(
    weights: Mapping[str, Tensor], threshold: Tensor, k: int, add_up: Sum | None = None, all_zeros: bool = True
) -> dict[str, PruneCount]:
    """Count the elements of each tensor that are among the k smallest magnitudes of all.

    All magnitudes below the threshold are pruned. Of those that equal it, the first ones are pruned until there are k,
    in the order of the mapping and of the elements of each tensor.

    Args:
        weights: tensors by name.
        threshold: the k-th smallest magnitude, as `kth_magnitude` returns it.
        k: number of elements to prune.
        add_up: as in `kth_magnitude`; the counts are then those of the whole weights.
        all_zeros: whether all zero elements are counted if the threshold is zero, even if there are more than k.

    Returns:
        The counts by name, in the order of the mapping. The call waits for the device.

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
    quota = sum(equal.values()) if all_zeros and threshold == 0 else k - sum(below.values())
    counts: dict[str, PruneCount] = {}
    for name in weights:
        pruned = max(0, min(equal[name], quota))
        quota -= pruned
        counts[name] = PruneCount(below[name] + pruned, equal[name] - pruned)
    return counts

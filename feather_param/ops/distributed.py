"""Weights whose elements are divided over processes: under FSDP2 (`fully_shard`) these are `DTensor` objects."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from feather_param.utils.text import printable

T = TypeVar("T")

Sum = Callable[[Tensor], Tensor]
"""Adds up a tensor of counts over the processes that hold the weights; it may change its argument."""


def is_sharded(tensor: object) -> bool:
    """Return whether a tensor is a `DTensor`."""
    module = sys.modules.get("torch.distributed.tensor")  # if it was never imported, no DTensor exists
    return module is not None and isinstance(tensor, module.DTensor)


def shard(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor that this process holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def held_here(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Sum | None]:
    """Return the elements of each weight that this process counts, and the sum of counts over all processes.

    Each element of each weight is counted by exactly one process. If a weight is replicated, the first process counts
    it, and the others get an empty tensor. If no weight is sharded, this returns the weights and None.

    Raises:
        ValueError: two weights are sharded over different meshes, or a weight has a partial placement.
    """
    sharded = {name: weight for name, weight in weights.items() if is_sharded(weight)}
    if not sharded:
        return dict(weights), None
    first = next(iter(sharded))
    mesh: Any = sharded[first].device_mesh  # type: ignore[attr-defined]
    coordinate = mesh.get_coordinate()
    parts: dict[str, Tensor] = {}
    for name, weight in weights.items():
        replicated = range(mesh.ndim)
        if name in sharded:
            other: Any = weight
            if other.device_mesh != mesh or any(placement.is_partial() for placement in other.placements):
                raise ValueError(
                    f"expected all the weights to be sharded over one mesh, got {printable(name)} over "
                    f"{other.device_mesh} as {other.placements} and {printable(first)} over {mesh}; give every "
                    "fully_shard call the same mesh"
                )
            replicated = [dim for dim, placement in enumerate(other.placements) if placement.is_replicate()]
        part = shard(weight.detach())
        parts[name] = part if all(coordinate[dim] == 0 for dim in replicated) else part.new_empty(0)

    def add_up(counts: Tensor) -> Tensor:
        for dim in range(mesh.ndim):
            dist.all_reduce(counts, group=mesh.get_group(dim))
        return counts

    return parts, add_up


def local(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of a whole tensor, divided as another tensor of the same shape is.

    If `like` is sharded, all processes must call this. Otherwise the whole tensor is returned.
    """
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements).to_local()  # type: ignore[attr-defined]


def whole(value: T) -> T:
    """Return the whole of a tensor, gathered from all processes if it is sharded. Other values stay as they are.

    If it is sharded, all processes must call this.
    """
    return value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]

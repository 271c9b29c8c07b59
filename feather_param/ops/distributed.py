"""Weights of which each process holds a part: under FSDP2 (`fully_shard`) they are `DTensor` objects."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

Sum = Callable[[Tensor], Tensor]
"""Adds up a tensor of counts over the processes that hold the parts of the weights."""


def is_sharded(tensor: object) -> bool:
    """Return whether something is a tensor distributed over processes."""
    module = sys.modules.get("torch.distributed.tensor")  # where it was never imported, there is no such tensor
    return module is not None and isinstance(tensor, module.DTensor)


def held_here(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Sum | None]:
    """Return the elements that this process answers for, and how counts are added up over the processes.

    Over all processes each element of each weight is answered for exactly once: where a weight is replicated, by the
    first process. Without sharded weights, that is everything and None.

    Raises:
        ValueError: two weights are sharded over different meshes, or one is not sharded plainly.
    """
    sharded = {name: weight for name, weight in weights.items() if is_sharded(weight)}
    if not sharded:
        return dict(weights), None
    first = next(iter(sharded))
    mesh: Any = sharded[first].device_mesh  # type: ignore[attr-defined]
    place = mesh.get_coordinate()
    parts: dict[str, Tensor] = {}
    for name, weight in weights.items():
        part: Any = weight.detach()
        copied = range(mesh.ndim)
        if name in sharded:
            if part.device_mesh != mesh or any(placement.is_partial() for placement in part.placements):
                raise ValueError(
                    f"expected all the weights to be sharded over one mesh, got {name} over {part.device_mesh} as "
                    f"{part.placements} and {first} over {mesh}; give every fully_shard call the same mesh"
                )
            copied = [dim for dim, placement in enumerate(part.placements) if placement.is_replicate()]
            part = part.to_local()
        parts[name] = part if all(place[dim] == 0 for dim in copied) else part.new_empty(0)

    def add_up(counts: Tensor) -> Tensor:
        for dim in range(mesh.ndim):
            dist.all_reduce(counts, group=mesh.get_group(dim))
        return counts

    return parts, add_up


def local(tensor: Any, like: Any) -> Any:
    """Return the part of a whole tensor that this process holds of another one of the same shape; all call this."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements).to_local()


def whole(tensor: Any) -> Any:
    """Return the whole of a tensor, gathered from the processes if it is sharded; then all of them must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor

"""Elements that share memory: within a tensor (`Tensor.expand`), or in two views of one buffer.

A write to one of them changes the others. So the zeros of such weights could not be exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from feather_param.utils.text import printable


def require_own_elements(name: str, weight: Tensor) -> None:
    """Refuse a weight of which several elements share memory.

    Raises:
        ValueError: two elements share memory. The message names the weight.
    """
    if shares_elements(weight):
        raise ValueError(
            f"expected a weight whose elements have their own memory, got {printable(name)} of shape "
            f"{tuple(weight.shape)} and strides {weight.stride()}, several of which share it, as after expand(); "
            "replace it with a copy, nn.Parameter(weight.detach().contiguous())"
        )


def require_own_memory(weights: Iterable[tuple[str, Tensor]], others: Iterable[tuple[str, Tensor]] = ()) -> None:
    """Refuse weights that share memory with another tensor, or of which several elements share memory.

    Views of one buffer that do not overlap pass, and so does one tensor with several names.

    Args:
        weights: pairs of a name and a Parameter.
        others: Parameters that may overlap with each other, but not with a weight.

    Raises:
        ValueError: two elements share memory. The message names the weights.
    """
    areas: dict[int, _Area] = {}
    for name, weight in weights:
        require_own_elements(name, weight)
        areas.setdefault(id(weight), _Area(name, weight, True))
    for name, other in others:
        areas.setdefault(id(other), _Area(name, other, False))
    for cluster in _clusters([area for area in areas.values() if area.known]):
        if pair := _overlap(cluster):
            raise ValueError(
                f"expected a weight with its own memory, got {printable(pair[0].name)}, which shares memory with "
                f"{printable(pair[1].name)}; "
                "if they are tied, use one Parameter in both places, else replace one with a copy, "
                "nn.Parameter(weight.detach().clone())"
            )


def shares_elements(tensor: Tensor) -> bool:
    """Return whether two elements of a tensor share memory.

    Example:
        >>> shares_elements(torch.ones(2, 1).expand(2, 3)), shares_elements(torch.ones(3, 2).t())
        (True, False)
    """
    if tensor.layout != torch.strided or tensor.is_contiguous():
        return False
    reach = 0  # the largest distance of two elements along the dimensions with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return not stride or _length(tensor) < tensor.numel() or _marked(tensor) < tensor.numel()
        reach += stride * (size - 1)
    return False


class _Area(NamedTuple):
    """The memory of a Parameter."""

    name: str
    tensor: Tensor
    own: bool  # whether it is a weight, which may not overlap with another area

    @property
    def known(self) -> bool:
        """Whether the Parameter has memory, and its address is known."""
        tensor = self.tensor
        if is_lazy(tensor) or type(tensor.data) is not Tensor or tensor.layout != torch.strided:
            return False
        return tensor.device.type in ("cpu", "cuda") and tensor.numel() > 0 and self.start > 0

    @property
    def start(self) -> int:
        return self.tensor.data_ptr()

    @property
    def end(self) -> int:
        return self.start + _length(self.tensor) * self.tensor.element_size()

    def of(self, memory: Tensor, start: int, unit: int) -> Tensor:
        """Return this area as a view of a tensor that has one element for each `unit` bytes from an address on."""
        width, tensor = self.tensor.element_size() // unit, self.tensor
        strides = [width * stride for stride in tensor.stride()]
        return memory.as_strided((*tensor.shape, width), (*strides, 1), (self.start - start) // unit)


def _clusters(areas: list[_Area]) -> Iterator[list[_Area]]:
    """Yield the areas whose ranges of addresses overlap, and that may therefore share memory."""
    cluster: list[_Area] = []
    device, end = None, 0
    for area in sorted(areas, key=lambda area: (str(area.tensor.device), area.start)):
        if cluster and (area.tensor.device != device or area.start >= end):
            yield cluster
            cluster, end = [], 0
        cluster.append(area)
        device, end = area.tensor.device, max(end, area.end)
    yield cluster


def _overlap(cluster: list[_Area]) -> tuple[_Area, _Area] | None:
    """Return a weight and an area that share memory, or None if no weight does."""
    if len(cluster) < 2:
        return None
    start = min(area.start for area in cluster)
    size = max(area.end for area in cluster) - start
    unit = math.gcd(*(number for area in cluster for number in (area.start - start, area.tensor.element_size())))
    used = torch.zeros(size // unit, dtype=torch.bool, device="cpu")
    for index, area in enumerate(in_order := sorted(cluster, key=lambda area: not area.own)):
        places = area.of(used, start, unit)
        if places.any():
            if index == 1:
                return in_order[0], area
            return next(pair for weight in in_order[:index] if (pair := _overlap([weight, area])))
        if area.own:
            places.fill_(True)
    return None


def _length(tensor: Tensor) -> int:
    """Return the distance between the first and the last element of a tensor in memory, plus one."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _marked(tensor: Tensor) -> int:
    """Return the number of places in memory that the elements of a tensor have. No stride is 0."""
    memory = torch.zeros(_length(tensor), dtype=torch.bool, device="cpu")
    memory.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return int(memory.sum())

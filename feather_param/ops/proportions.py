"""Zeros or survivors of each weight, in proportion to numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from feather_param.ops.groups import Group, group_each
from feather_param.utils.checks import real
from feather_param.utils.split import split
from feather_param.utils.text import printable


def zeros_in_proportion(
    weights: Mapping[str, Tensor], zeros: int, guards: Mapping[str, int], numbers: Mapping[str, float]
) -> list[Group]:
    """Give weights zeros in proportion to numbers, at most their guards. The number 0 gives no zeros."""
    most = {name: guards.get(name, weight.numel()) for name, weight in weights.items()}
    _require_room(zeros, sum(most[name] for name in weights if numbers[name] > 0))
    return group_each(weights, split(zeros, numbers, dict.fromkeys(weights, 0), most))


def survivors_in_proportion(
    weights: Mapping[str, Tensor], zeros: int, guards: Mapping[str, int], number: Callable[[str, Tensor], float]
) -> list[Group]:
    """Give weights survivors in proportion to a number, at least as many as their guards demand."""
    numbers = {name: real("the number for a weight", number(name, weight)) for name, weight in weights.items()}
    sizes = {name: weight.numel() for name, weight in weights.items()}
    for name, value in numbers.items():
        if sizes[name] and not 0 < value < math.inf:
            raise ValueError(
                f"expected the number for a weight to be finite and > 0, got {value} for {printable(name)}"
            )
    return _with_survivors(weights, zeros, guards, numbers)


def zeros_as_listed(
    weights: Mapping[str, Tensor], zeros: int, guards: Mapping[str, int], listed: Mapping[str, int]
) -> list[Group]:
    """Give weights listed numbers of zeros, or fewer in proportion to these, or survivors in proportion to theirs.

    A weight for which 0 is listed gets no zeros. A weight of which all elements are listed stays without survivors.
    """
    if zeros <= sum(listed.values()):
        return zeros_in_proportion(weights, zeros, guards, listed)
    remaining = {name: float(max(0, weight.numel() - listed[name])) for name, weight in weights.items()}
    dense = {name: 0 for name, number in listed.items() if not number}
    return _with_survivors(weights, zeros, {**guards, **dense}, remaining)


def _with_survivors(
    weights: Mapping[str, Tensor], zeros: int, guards: Mapping[str, int], numbers: Mapping[str, float]
) -> list[Group]:
    sizes = {name: weight.numel() for name, weight in weights.items()}
    least = {name: size - guards.get(name, size) for name, size in sizes.items()}
    total = sum(sizes.values())
    _require_room(zeros, total - sum(least.values()))
    survivors = split(total - zeros, numbers, least, sizes)
    return group_each(weights, {name: size - survivors[name] for name, size in sizes.items()})


def _require_room(zeros: int, room: int) -> None:
    if zeros > room:
        raise ValueError(
            f"expected an allocation with room for {zeros:,} zeros, got one in which the weights that are not dense "
            f"can have {room:,}; lower final_rate, or prune more weights"
        )

"""The groups of an allocation at the final rate, checked before the model is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from feather_param.core.config import Config
from feather_param.ops.groups import Group, count_zeros, require_total
from feather_param.ops.values import without_values_if_one_is
from feather_param.utils.text import listed, name_of, printable


def final_groups(config: Config, weights: Mapping[str, Tensor]) -> list[Group]:
    """Return the groups of the allocation at ``final_rate``.

    Their zeros are numbers of units of the pattern. If a weight is on the meta device, thresholds have no values, and
    zeros that depend on magnitudes are not known.

    Args:
        config: the settings.
        weights: the weights to prune, by name; none is sharded.

    Raises:
        TypeError: the allocation returns something else than groups.
        ValueError: the groups do not fit the weights, the number of zeros or the guards.
    """
    weights = without_values_if_one_is(weights)
    budget = config.budget({name: weight.numel() for name, weight in weights.items()})
    zeros, guards = budget.zeros(config.final_rate), budget.guards
    seen = config.pattern.allocated(weights)
    allocation = f"the allocation {name_of(config.allocation)}"
    try:
        groups = config.allocation(seen, zeros, guards)
    except (RuntimeError, NotImplementedError) as error:
        if not any(weight.is_meta for weight in seen.values()):
            raise
        raise ValueError(
            f"expected {allocation} to accept weights on the meta device, got {type(error).__name__} ({error}); for "
            "these let it return global_magnitude(weights, zeros, guards) if it reads values"
        ) from error
    if not isinstance(groups, list) or not all(isinstance(group, Group) for group in groups):
        kind = f"a list of {type(groups[0]).__name__}" if isinstance(groups, list) else type(groups).__name__
        raise TypeError(f"expected {allocation} to return a list of Group, got {kind}; end it with group_each")
    _check_types(groups, allocation, weights)
    _check(groups, allocation, budget.sizes, zeros)
    if not any(weight.is_meta for weight in seen.values()):  # called with the values, so these are the final groups
        _check_values(groups, allocation, seen, guards)
        return groups
    for group in groups:
        if len(group.names) == 1 and seen[group.names[0]].is_meta:
            _check_guard(group.names[0], group.zeros, guards, allocation)
    groups = config.pattern.allocate(config.allocation, weights, zeros, guards)
    units, zeros, guards = config.pattern.in_units(weights, zeros, guards)
    _check_types(groups, allocation, units)
    _check(groups, allocation, {name: each.numel() for name, each in units.items()}, zeros)
    if not any(each.is_meta for each in units.values()):
        _check_values(groups, allocation, units, guards)
    return groups


def _check_types(groups: list[Group], allocation: str, weights: Mapping[str, Tensor]) -> None:
    """Check the types of the names, zeros and thresholds of groups."""
    for group in groups:
        if not isinstance(group.names, tuple) or not isinstance(group.zeros, int):
            raise TypeError(
                f"expected {allocation} to return groups with a tuple of names and an int of zeros, got "
                f"{printable(repr(group.names))} and {group.zeros!r}; end it with group_each"
            )
        double = any(weights[name].dtype == torch.float64 for name in group.names if name in weights)
        dtype = torch.float64 if double else torch.float32
        threshold = group.threshold
        if not isinstance(threshold, Tensor) or threshold.dim() or (group.names and threshold.dtype != dtype):
            raise TypeError(
                f"expected {allocation} to return thresholds that are 0-dim tensors of {dtype}, got {threshold!r}; "
                "end it with group_each"
            )


def _check(groups: list[Group], allocation: str, sizes: Mapping[str, int], zeros: int) -> None:
    """Check the names and the zeros of groups."""
    times = Counter(name for group in groups for name in group.names)
    for name in [*sizes, *times]:
        if name not in sizes:
            raise ValueError(f"expected {allocation} to return the weights that it got, got {printable(name)} as well")
        if times[name] != 1:
            raise ValueError(
                f"expected {allocation} to put each weight in one group, got {printable(name)} in {times[name]}"
            )
    for group in groups:
        size = sum(sizes[name] for name in group.names)
        if not 0 <= group.zeros <= size:
            raise ValueError(
                f"expected {allocation} to give {listed(group.names) or 'an empty group'} from 0 to {size} zeros, "
                f"got {group.zeros}"
            )
    require_total(groups, zeros, allocation.removeprefix("the allocation "))


def _check_values(
    groups: list[Group], allocation: str, weights: Mapping[str, Tensor], guards: Mapping[str, int]
) -> None:
    """Check the thresholds and the guards of groups."""
    counts = count_zeros(weights, groups)
    for group in groups:
        pruned = sum(counts[name].zeros for name in group.names)
        if pruned != group.zeros and (pruned < group.zeros or group.threshold != 0):
            raise ValueError(
                f"expected {allocation} to return the {group.zeros}-th smallest magnitude of {listed(group.names)} "
                f"as the threshold, got {float(group.threshold)}; compute it with group_each"
            )
    for name in guards:
        pruned = counts[name].zeros
        if pruned > int((weights[name] == 0).sum()):
            _check_guard(name, pruned, guards, allocation)


def _check_guard(name: str, zeros: int, guards: Mapping[str, int], allocation: str) -> None:
    if zeros > guards.get(name, zeros):
        raise ValueError(
            f"expected {allocation} to give {printable(name)} at most {guards[name]} zeros, its guard, got {zeros}; "
            "respect the argument guards, or drop max_rate_per_layer and min_nonzero_per_layer"
        )

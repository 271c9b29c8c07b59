"""The groups of an allocation at the final rate, checked before the model is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from feather_param.core.config import Config
from feather_param.ops.groups import Group, count_zeros
from feather_param.utils.text import name_of


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
    if any(weight.is_meta for weight in weights.values()):
        weights = {name: weight.to("meta") for name, weight in weights.items()}
    budget = config.budget({name: weight.numel() for name, weight in weights.items()})
    units, zeros, guards = config.pattern.in_units(weights, budget.zeros(config.final_rate), budget.guards)
    groups = config.allocation(units, zeros, guards)
    allocation = f"the allocation {name_of(config.allocation)}"
    if not isinstance(groups, list) or not all(isinstance(group, Group) for group in groups):
        kind = f"a list of {type(groups[0]).__name__}" if isinstance(groups, list) else type(groups).__name__
        raise TypeError(f"expected {allocation} to return a list of Group, got {kind}; end it with group_each")
    _check(groups, allocation, {name: each.numel() for name, each in units.items()}, zeros)
    if not any(weight.is_meta for weight in weights.values()):
        _check_values(groups, allocation, units, guards)
    return groups


def _check(groups: list[Group], allocation: str, sizes: Mapping[str, int], zeros: int) -> None:
    """Check the names and the zeros of groups."""
    times = Counter(name for group in groups for name in group.names)
    for name in [*sizes, *times]:
        if name not in sizes:
            raise ValueError(f"expected {allocation} to return the weights that it got, got {name} as well")
        if times[name] != 1:
            raise ValueError(f"expected {allocation} to put each weight in one group, got {name} in {times[name]}")
    for group in groups:
        size = sum(sizes[name] for name in group.names)
        if not 0 <= group.zeros <= size:
            raise ValueError(
                f"expected {allocation} to give {', '.join(group.names) or 'an empty group'} from 0 to {size} zeros, "
                f"got {group.zeros}"
            )
    if (total := sum(group.zeros for group in groups)) != zeros:
        raise ValueError(f"expected {allocation} to give {zeros} zeros to all weights together, got {total}")


def _check_values(
    groups: list[Group], allocation: str, weights: Mapping[str, Tensor], guards: Mapping[str, int]
) -> None:
    """Check the thresholds and the guards of groups."""
    counts = count_zeros(weights, groups)
    for group in groups:
        pruned = sum(counts[name].zeros for name in group.names)
        if pruned != group.zeros and (pruned < group.zeros or group.threshold != 0):
            raise ValueError(
                f"expected {allocation} to return the {group.zeros}-th smallest magnitude of {', '.join(group.names)} "
                f"as the threshold, got {float(group.threshold)}; compute it with group_each"
            )
    for name, guard in guards.items():
        pruned = counts[name].zeros
        if pruned > guard and pruned > int((weights[name] == 0).sum()):
            raise ValueError(
                f"expected {allocation} to give {name} at most {guard} zeros, its guard, got {pruned}; respect the "
                "argument guards, or drop max_rate_per_layer and min_nonzero_per_layer"
            )

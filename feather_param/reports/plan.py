"""The plan of a sparsity: how many zeros `sparsify` would make in each weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import nn

from feather_param.allocations import Allocation, global_magnitude
from feather_param.core.checked_selection import checked_selection
from feather_param.core.config import Config
from feather_param.core.final_groups import final_groups
from feather_param.patterns import Pattern, elements
from feather_param.selection.globs import Filter
from feather_param.utils.text import aligned, described, grouped, name_of


@dataclass(frozen=True)
class PlannedWeight:
    """One prunable weight in a plan.

    Attributes:
        name: its name.
        shape: its shape.
        total: number of elements.
        most: the most zeros that its guard and the pattern allow.
        zeros: number of zeros. None if the rate cannot be reached, or if it depends on magnitudes and the model is on
            the meta device.
    """

    name: str
    shape: tuple[int, ...]
    total: int
    most: int
    zeros: int | None


@dataclass(frozen=True)
class Plan:
    """The zeros that `sparsify` would make with the same arguments.

    Attributes:
        rows: the prunable weights in the model's order.
        total: number of elements of all prunable weights, N.
        zeros: number of zeros to reach, ``round(final_rate * N)``, or the largest multiple of a unit's size up to it.
        most: the most zeros that the guards and the pattern allow.
        skipped: names of the weights that stay dense, with the reason.
        allocation: how the zeros are divided among the weights.
        pattern: which elements are pruned together; "elements": each by itself.
    """

    rows: tuple[PlannedWeight, ...]
    total: int
    zeros: int
    most: int
    skipped: dict[str, str] = field(default_factory=dict)
    allocation: str = "global_magnitude"
    pattern: str = "elements"

    @property
    def reachable(self) -> bool:
        """Whether the guards and the pattern allow `zeros`."""
        return self.zeros <= self.most

    @property
    def largest_rate(self) -> float:
        """The largest rate that the guards and the pattern allow."""
        return self.most / self.total

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [("weight", "shape", "total", "at most", "zeros at this rate", "rate")]
        for row in self.rows:
            now = ("-", "-") if row.zeros is None else (f"{row.zeros:,}", f"{row.zeros / max(1, row.total):.3%}")
            cells.append((row.name, "x".join(map(str, row.shape)), f"{row.total:,}", f"{row.most:,}", *now))
        aim = (f"{self.zeros:,}", f"{self.zeros / self.total:.3%}") if self.reachable else ("-", "-")
        cells.append(("all", "", f"{self.total:,}", f"{self.most:,}", *aim))
        lines = [*aligned(cells), *described(self.allocation, self.pattern)]
        lines += [f"dense: {line}" for line in grouped(self.skipped)]
        verdict = "can be reached" if self.reachable else "CANNOT be reached"
        most = f"{self.most:,} zeros ({math.floor(1e6 * self.most / self.total) / 1e4:.4f} %)"  # rounded down
        lines.append(f"{self.zeros:,} zeros of {self.total:,} elements {verdict}; at most {most}")
        return "\n".join(lines)


def plan(
    model: nn.Module,
    *,
    final_rate: float,
    allocation: Allocation = global_magnitude,
    pattern: Pattern | None = None,
    include: Filter | None = None,
    exclude: Filter | None = None,
    min_params: int = 0,
    max_rate_per_layer: float | None = None,
    min_nonzero_per_layer: int = 0,
) -> Plan:
    """Return the zeros that `sparsify` would make with these arguments. The model stays as it is.

    If the allocation depends on magnitudes, as `global_magnitude` does, the zeros of each weight follow from the
    current ones. They are a good forecast for a pretrained model, but not for a new one. If it depends on names and
    shapes only, they are exact, also on the meta device. The totals are always exact.

    The arguments are those of `sparsify`. ``str(plan)`` is a readable table.

    Raises:
        ValueError: `sparsify` would refuse the model or an argument. A rate that cannot be reached is no error here.
        TypeError: an argument is of the wrong type.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> found = plan(model, final_rate=0.95, max_rate_per_layer=0.9)
        >>> found.zeros, found.most, found.reachable, found.largest_rate
        (152, 143, False, 0.89375)
    """
    config = Config(
        final_rate,
        allocation=allocation,
        pattern=elements if pattern is None else pattern,
        max_rate_per_layer=max_rate_per_layer,
        min_nonzero_per_layer=min_nonzero_per_layer,
    )
    selection = checked_selection(model, include, exclude, min_params)
    config.pattern.require_fit(selection.dense())
    budget = config.budget(selection.sizes)
    k = budget.zeros(config.final_rate)
    weights = selection.dense()
    zeros: dict[str, int | None] = dict.fromkeys(weights)
    if k <= budget.most:
        groups = final_groups(config, weights)
        if any(group.threshold.is_meta for group in groups):
            size = config.pattern.size
            zeros |= {group.names[0]: size * group.zeros for group in groups if len(group.names) == 1}
        else:
            zeros |= {name: count.zeros for name, count in config.pattern.count_zeros(weights, groups).items()}
    rows = tuple(
        PlannedWeight(name, tuple(weight.shape), weight.numel(), budget.guards.get(name, weight.numel()), zeros[name])
        for name, weight in weights.items()
    )
    names = name_of(config.allocation), str(config.pattern)
    return Plan(rows, budget.total, k, budget.most, selection.skipped, *names)

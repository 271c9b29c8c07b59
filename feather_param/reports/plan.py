"""What a sparsity would take from a model, told before anything is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import nn

from feather_param.allocations import count_zeros
from feather_param.core.baking import check_other_parametrizations
from feather_param.core.config import Config
from feather_param.ops.finite import require_finite
from feather_param.selection.select import Filter, select
from feather_param.utils.text import aligned, grouped


@dataclass(frozen=True)
class PlannedWeight:
    """One prunable weight: its size, the most zeros it may get, and those it would get by its magnitudes of today."""

    name: str
    shape: tuple[int, ...]
    total: int
    most: int
    zeros: int | None


@dataclass(frozen=True)
class Plan:
    """What `sparsify` would do with the same arguments."""

    rows: tuple[PlannedWeight, ...]  # the prunable weights in the model's order
    total: int  # number of elements of all of them, N
    zeros: int  # number of zeros aimed at, round(final_rate * N)
    most: int  # the most zeros that can be reached
    skipped: dict[str, str] = field(default_factory=dict)  # the weights left dense, with the reason

    @property
    def reachable(self) -> bool:
        """Whether `zeros` can be reached."""
        return self.zeros <= self.most

    @property
    def largest_rate(self) -> float:
        """The largest rate that can be reached."""
        return self.most / self.total

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [("weight", "shape", "total", "at most", "zeros at this rate", "rate")]
        for row in self.rows:
            now = ("-", "-") if row.zeros is None else (f"{row.zeros:,}", f"{row.zeros / max(1, row.total):.3%}")
            cells.append((row.name, "x".join(map(str, row.shape)), f"{row.total:,}", f"{row.most:,}", *now))
        aim = (f"{self.zeros:,}", f"{self.zeros / self.total:.3%}") if self.reachable else ("-", "-")
        cells.append(("all", "", f"{self.total:,}", f"{self.most:,}", *aim))
        lines = aligned(cells)
        lines += [f"dense: {line}" for line in grouped(self.skipped)]
        verdict = "can be reached" if self.reachable else "CANNOT be reached"
        most = f"{self.most:,} zeros ({math.floor(1e6 * self.most / self.total) / 1e4:.4f} %)"  # never more than it is
        lines.append(f"{self.zeros:,} of {self.total:,} zeros {verdict}; at most {most}")
        return "\n".join(lines)


def plan(
    model: nn.Module,
    *,
    final_rate: float,
    include: Filter | None = None,
    exclude: Filter | None = None,
    min_params: int = 0,
    max_rate_per_layer: float | None = None,
    min_nonzero_per_layer: int = 0,
) -> Plan:
    """Tell what `sparsify` would do with these arguments, without touching the model.

    The zeros of each weight are those by the magnitudes of today: a forecast for a pretrained model, hardly one for a
    new one. The totals are exact.

    The arguments are those of `sparsify`; ``str()`` of the plan is a readable table.

    Raises:
        ValueError: `sparsify` would refuse the model or an argument; only a rate out of reach is no error here.
        TypeError: an argument is of the wrong type.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> found = plan(model, final_rate=0.95, max_rate_per_layer=0.9)
        >>> found.zeros, found.most, found.reachable, found.largest_rate
        (152, 143, False, 0.89375)
    """
    config = Config(final_rate, max_rate_per_layer=max_rate_per_layer, min_nonzero_per_layer=min_nonzero_per_layer)
    selection = select(model, include, exclude, min_params)
    check_other_parametrizations(selection.weights)
    budget = config.budget(selection.sizes)
    k = budget.zeros(config.final_rate)
    weights = selection.dense()
    require_finite(weights, new=True)
    zeros: dict[str, int | None] = dict.fromkeys(weights)
    if k <= budget.most and not any(weight.is_meta for weight in weights.values()):
        counts = count_zeros(weights, config.allocation(weights, k, budget.guards))
        zeros = {name: count.zeros for name, count in counts.items()}
    rows = tuple(
        PlannedWeight(name, tuple(weight.shape), weight.numel(), budget.guards.get(name, weight.numel()), zeros[name])
        for name, weight in weights.items()
    )
    return Plan(rows, budget.total, k, budget.most, selection.skipped)

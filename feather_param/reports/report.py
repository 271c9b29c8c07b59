"""The report of a sparsified model: the zeros of each weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from feather_param.ops.count import PruneCount
from feather_param.utils.text import aligned, described, grouped, printable, ratio


@dataclass(frozen=True)
class Row:
    """One prunable weight in a report.

    Attributes:
        name: its name.
        shape: its shape.
        total: number of elements.
        zeros: number of elements that are zero.
        survivor_fraction: its survivors as a fraction of the survivors of all weights.
        outputs: number of output features or channels that it computes; of a weight from a file, its first dimension.
        ties: number of kept elements whose magnitude equals the threshold. `desparsify` stores each as a negligible
            number that is not zero, so that the number of zeros is exact. They do not count as survivors.
    """

    name: str
    shape: tuple[int, ...]
    total: int
    zeros: int
    survivor_fraction: float
    outputs: int
    ties: int = 0

    @property
    def survivors(self) -> int:
        """Number of elements that survive."""
        return self.total - self.zeros - self.ties

    @property
    def survivors_per_output(self) -> float:
        """Mean number of survivors of an output. The weight starves if it is below 1: some outputs have no input."""
        return self.survivors / self.outputs if self.outputs else 0.0

    @property
    def rate(self) -> float:
        """Fraction of zeros."""
        return self.zeros / self.total if self.total else 0.0


@dataclass(frozen=True)
class Report:
    """The weights that `desparsify` would write: a row for each weight, the totals, and the dense weights.

    Attributes:
        rows: the prunable weights in the model's order.
        skipped: names of the weights that stay dense, with the reason.
        pattern: which elements are pruned together; "elements": each by itself.
        allocation: how the zeros were divided among the weights.

    Example:
        >>> print(Report((Row("fc.weight", (10, 4), 40, 30, 1.0, outputs=10),)))
        weight     shape  total  zeros     rate  of all survivors  per output
        fc.weight  10x4      40     30  75.000%           100.00%         1.0
        all                  40     30  75.000%           100.00%         1.0
    """

    rows: tuple[Row, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    pattern: str = "elements"
    allocation: str = "global_magnitude"

    @property
    def total(self) -> int:
        """Number of elements of all prunable weights."""
        return sum(row.total for row in self.rows)

    @property
    def zeros(self) -> int:
        """Number of zeros in all prunable weights."""
        return sum(row.zeros for row in self.rows)

    @property
    def survivors(self) -> int:
        """Number of elements that survive."""
        return sum(row.survivors for row in self.rows)

    @property
    def survivors_per_output(self) -> float:
        """Mean number of survivors of an output of all layers."""
        return self.survivors / max(1, sum(row.outputs for row in self.rows))

    @property
    def rate(self) -> float:
        """Fraction of zeros in all prunable weights."""
        return self.zeros / self.total if self.total else 0.0

    @property
    def dead(self) -> tuple[str, ...]:
        """Names of the weights without survivors."""
        return tuple(row.name for row in self.rows if row.total and not row.survivors)

    @property
    def starving(self) -> tuple[str, ...]:
        """Names of the weights with fewer survivors than outputs."""
        return tuple(row.name for row in self.rows if row.total and row.survivors < row.outputs)

    def __str__(self) -> str:
        cells = [("weight", "shape", "total", "zeros", "rate", "of all survivors", "per output")]
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            counts = (f"{row.total:,}", f"{row.zeros:,}", f"{row.rate:.3%}", f"{row.survivor_fraction:.2%}")
            cells.append((row.name, shape, *counts, ratio(row.survivors_per_output)))
        cells.append(
            (
                "all",
                "",
                f"{self.total:,}",
                f"{self.zeros:,}",
                f"{self.rate:.3%}",
                "100.00%",
                ratio(self.survivors_per_output),
            )
        )
        lines = aligned(cells)
        lines += described(self.allocation, self.pattern)
        tied = [row for row in self.rows if row.ties]
        lines += [
            f"ties: {row.ties:,} elements of {printable(row.name)} equal the threshold and compute as zero"
            for row in tied
        ]
        lines += [f"dense: {line}" for line in grouped(self.skipped)]
        return "\n".join(lines)


def rows(
    weights: Mapping[str, Tensor], counts: Mapping[str, PruneCount], outputs: Mapping[str, int]
) -> tuple[Row, ...]:
    """Return a row for each weight, from the numbers of its zeros, ties and outputs."""
    survivors = {name: weight.numel() - counts[name].zeros - counts[name].ties for name, weight in weights.items()}
    whole = max(1, sum(survivors.values()))
    return tuple(
        Row(
            name,
            tuple(weight.shape),
            weight.numel(),
            counts[name].zeros,
            survivors[name] / whole,
            outputs[name],
            counts[name].ties,
        )
        for name, weight in weights.items()
    )

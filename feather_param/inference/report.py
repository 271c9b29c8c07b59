"""The report of `to_sparse_inference`: times and sizes of each layer, dense and sparse."""

from __future__ import annotations

from dataclasses import dataclass

from feather_param.inference.choices import Choices
from feather_param.utils.text import aligned, printable

_ROOT = "(the model)"  # in tables, the name of a layer that is the whole model


@dataclass(frozen=True)
class InferenceRow:
    """One Linear, Conv or MaxPool layer: its time and size, dense and sparse.

    The times are those of the layer with the batch norm, addition and activation that are computed with it. They are
    None if the layer was not timed.
    """

    name: str
    shape: tuple[int, ...]  # of its weight
    rate: float  # fraction of zeros in the weight
    method: str  # of the returned model: "dense" or "sparse"
    dense_ms: float | None  # milliseconds of all its calls in one pass
    sparse_ms: float | None
    dense_mb: float  # megabytes (10^6 bytes) of weight and bias
    sparse_mb: float | None
    reason: str = ""  # why it stays dense


@dataclass(frozen=True)
class InferenceReport:
    """The measurements of `to_sparse_inference`: a row for each layer, and totals of the network.

    Example:
        >>> row = InferenceRow("fc", (8, 4), 0.75, "sparse", 1.0, 0.25, 0.4, 0.2)
        >>> choices = Choices("x86_64 znver4, torch 2.6", 1, "sparse", ("fc",))
        >>> print(InferenceReport((row,), 1.25, 0.5, 0.4, 0.2, choices))
        layer  shape  zeros  method  dense ms  sparse ms  gain  dense MB  sparse MB
        fc     8x4    75.0%  sparse     1.000      0.250  4.0x      0.40       0.20
        all                             1.250      0.500  2.5x      0.40       0.20
        float32, CPU threads: 1
    """

    rows: tuple[InferenceRow, ...]  # the layers in the order of the model
    dense_ms: float | None  # milliseconds of the model for the example input; None if the choices were given
    sparse_ms: float | None  # of the returned network
    dense_mb: float  # megabytes of all parameters and buffers
    sparse_mb: float
    choices: Choices
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        cells = [["layer", "shape", "zeros", "method", "dense ms", "sparse ms", "gain", "dense MB", "sparse MB"]]
        for row in self.rows:
            figures = _figures(row.dense_ms, row.sparse_ms, row.method != "dense", row.dense_mb, row.sparse_mb)
            zeros = f"{row.rate:.1%}" if row.shape else ""
            cells.append([row.name or _ROOT, "x".join(map(str, row.shape)), zeros, row.method, *figures])
        gain = self.choices.network != "dense"
        figures = _figures(self.dense_ms, self.sparse_ms, gain, self.dense_mb, self.sparse_mb)
        lines = aligned([*cells, ["all", "", "", "", *figures]])
        lines += [f"dense: {printable(row.name or _ROOT)} ({printable(row.reason)})" for row in self.rows if row.reason]
        return "\n".join([*lines, f"float32, CPU threads: {self.threads}", *self.notes])

    @property
    def swapped(self) -> tuple[str, ...]:
        """Names of the layers that are sparse in the returned model."""
        return tuple(row.name for row in self.rows if row.method != "dense")

    @property
    def threads(self) -> int:
        """`torch.get_num_threads()` during the measurement."""
        return self.choices.threads


def _figures(dense: float | None, sparse: float | None, gain: bool, mb: float, sparse_mb: float | None) -> list[str]:
    """Return the cells from dense ms to sparse MB."""
    milliseconds = ["-" if value is None else f"{value:.3f}" for value in (dense, sparse)]
    times = "-" if dense is None else f"{dense / sparse:.1f}x" if gain and dense and sparse else "no gain"
    return [*milliseconds, times, f"{mb:.2f}", "-" if sparse_mb is None else f"{sparse_mb:.2f}"]

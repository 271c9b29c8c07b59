"""Write reports as TensorBoard scalars."""

from __future__ import annotations

from typing import Any, Protocol

from feather_param.reports.history import Record
from feather_param.reports.multiply_adds import MultiplyAdds
from feather_param.reports.report import Report
from feather_param.utils.checks import instance

__all__ = ["ScalarWriter", "add_multiply_adds", "add_record", "add_report"]


class ScalarWriter(Protocol):
    """A writer of scalars, for example ``torch.utils.tensorboard.SummaryWriter`` (``feather_param[tensorboard]``)."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any: ...


def add_report(writer: ScalarWriter, report: Report, step: int) -> None:
    """Write the fraction of survivors of each weight as ``survivors/NAME``.

    Args:
        writer: the writer.
        report: the report that `Controller.report` returned.
        step: number of optimizer steps made.

    Example:
        >>> class Writer:
        ...     def add_scalar(self, tag, value, step):
        ...         print(tag, value, step)
        >>> controller = feather_param.sparsify(nn.Linear(4, 4), final_rate=0.75, total_steps=1, end_step=0)
        >>> add_report(Writer(), controller.report(), step=7)
        survivors/weight 0.25 7
    """
    instance(report, Report, "controller.report()")
    for row in report.rows:
        writer.add_scalar(f"survivors/{row.name}", row.survivors / max(1, row.total), step)


def add_record(writer: ScalarWriter, record: Record) -> None:
    """Write a record of a `History` at its step: rate, threshold, survivors and churn.

    The tags of the churn are ``churn/entered`` and ``churn/left`` for all weights together, and ``entered/NAME`` for
    each weight. The values are fractions of the survivors.

    Args:
        writer: the writer.
        record: the record.

    Example:
        >>> class Writer:
        ...     def add_scalar(self, tag, value, step):
        ...         print(tag, round(value, 2), step)
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight = nn.Parameter(torch.tensor([[1.0, -2.0], [-4.0, 3.0]]))
        >>> from feather_param.reports import History
        >>> add_record(Writer(), History(feather_param.sparsify(layer, final_rate=0.5, total_steps=1)).records[0])
        sparsity/rate 0.5 0
        sparsity/threshold 2.0 0
        churn/entered 0.0 0
        churn/left 0.0 0
        survivors/weight 0.5 0
        entered/weight 0.0 0
    """
    instance(record, Record, "history.records")
    survivors = max(1, record.survivors)
    values = {"sparsity/rate": record.rate, "sparsity/threshold": record.threshold}
    values |= {"churn/entered": record.entered / survivors, "churn/left": record.left / survivors}
    for layer in record.layers:
        values[f"survivors/{layer.name}"] = layer.survivors / max(1, layer.total)
        values[f"entered/{layer.name}"] = layer.entered / max(1, layer.survivors)
    for tag, value in values.items():
        writer.add_scalar(tag, value, record.step)


def add_multiply_adds(writer: ScalarWriter, counted: MultiplyAdds, step: int) -> None:
    """Write the fraction of remaining multiply-adds as ``multiply_adds/remaining`` and ``multiply_adds/NAME``.

    Args:
        writer: the writer.
        counted: the count that `multiply_adds` returned.
        step: number of optimizer steps made.
    """
    instance(counted, MultiplyAdds, "multiply_adds(model, input)")
    writer.add_scalar("multiply_adds/remaining", counted.remaining / max(1, counted.dense), step)
    for row in counted.rows:
        writer.add_scalar(f"multiply_adds/{row.name}", row.remaining / max(1, row.dense), step)

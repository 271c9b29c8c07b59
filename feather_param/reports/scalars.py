"""Write reports as scalars, with the logger of any tool. The names of the weights are not escaped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from feather_param.reports.history import Record
from feather_param.reports.multiply_adds import MultiplyAdds
from feather_param.reports.report import Report
from feather_param.utils.checks import instance

__all__ = ["Logger", "log_multiply_adds", "log_record", "log_report"]

Logger = Callable[[str, float, int], Any]
"""A function ``(name, value, step)``. `docs/reports.md` has those of TensorBoard, wandb and mlflow."""


def log_report(log: Logger, report: Report, step: int) -> None:
    """Log the fraction of survivors of each weight as ``survivors/NAME``.

    Args:
        log: the logger, for example the method ``add_scalar`` of a TensorBoard writer.
        report: the report that `Controller.report` returned.
        step: number of optimizer steps made.

    Raises:
        TypeError: ``log`` is not callable, or ``report`` is no report.

    Example:
        >>> controller = feather_param.sparsify(nn.Linear(4, 4), final_rate=0.75, total_steps=1, end_step=0)
        >>> log_report(print, controller.report(), step=7)
        survivors/weight 0.25 7
    """
    instance(report, Report, "controller.report()")
    _log(log, {f"survivors/{row.name}": row.survivors / max(1, row.total) for row in report.rows}, step)


def log_record(log: Logger, record: Record) -> None:
    """Log a record of a `History` at its step: rate, threshold, survivors and churn.

    The names of the churn are ``churn/entered`` and ``churn/left`` for all weights together, and ``entered/NAME`` for
    each weight. The values are fractions of the survivors.

    Args:
        log: the logger.
        record: the record.

    Raises:
        TypeError: ``log`` is not callable, or ``record`` is no record.

    Example:
        >>> from feather_param.reports import History
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight = nn.Parameter(torch.tensor([[1.0, -2.0], [-4.0, 3.0]]))
        >>> log_record(print, History(feather_param.sparsify(layer, final_rate=0.5, total_steps=1)).records[0])
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
    _log(log, values, record.step)


def log_multiply_adds(log: Logger, counted: MultiplyAdds, step: int) -> None:
    """Log the fraction of remaining multiply-adds as ``multiply_adds/remaining`` and ``multiply_adds/NAME``.

    Args:
        log: the logger.
        counted: the count that `multiply_adds` returned.
        step: number of optimizer steps made.

    Raises:
        TypeError: ``log`` is not callable, or ``counted`` is no count.

    Example:
        >>> from feather_param.reports import multiply_adds
        >>> log_multiply_adds(print, multiply_adds(nn.Linear(4, 4), torch.zeros(1, 4)), step=7)
        multiply_adds/remaining 1.0 7
        multiply_adds/weight 1.0 7
    """
    instance(counted, MultiplyAdds, "multiply_adds(model, input)")
    values = {"multiply_adds/remaining": counted.remaining / max(1, counted.dense)}
    values |= {f"multiply_adds/{row.name}": row.remaining / max(1, row.dense) for row in counted.rows}
    _log(log, values, step)


def _log(log: Logger, values: dict[str, float], step: int) -> None:
    if not callable(log):
        hint = "; pass its method add_scalar" if hasattr(log, "add_scalar") else ""
        raise TypeError(f"expected log to be a function (name, value, step), got {type(log).__name__}{hint}")
    for name, value in values.items():
        log(name, value, step)

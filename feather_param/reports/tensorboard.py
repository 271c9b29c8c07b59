"""Reports as TensorBoard scalars, for a writer that the user has."""

from __future__ import annotations

from typing import Any, Protocol

from feather_param.reports.history import Look
from feather_param.reports.multiply_adds import MultiplyAdds
from feather_param.reports.report import Report
from feather_param.utils.checks import instance

__all__ = ["ScalarWriter", "add_look", "add_multiply_adds", "add_report"]


class ScalarWriter(Protocol):
    """What is needed of a writer, which SummaryWriter (``feather_param[tensorboard]``) and others have."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any: ...


def add_report(writer: ScalarWriter, report: Report, step: int) -> None:
    """Write the fraction of each weight that survives after so many optimizer steps, as ``survivors/NAME``.

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


def add_look(writer: ScalarWriter, look: Look) -> None:
    """Write a look of a `History` at its step: rate, threshold, survivors and churn.

    The churn of a weight is the number of elements that entered and left since the look before, as a fraction of
    those that survive: ``churn/entered`` and ``churn/left`` of all weights together, ``entered/NAME`` of each.

    Example:
        >>> class Writer:
        ...     def add_scalar(self, tag, value, step):
        ...         print(tag, round(value, 2), step)
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight = nn.Parameter(torch.tensor([[1.0, -2.0], [-4.0, 3.0]]))
        >>> from feather_param.reports.history import History
        >>> add_look(Writer(), History(feather_param.sparsify(layer, final_rate=0.5, total_steps=1)).looks[0])
        sparsity/rate 0.5 0
        sparsity/threshold 2.0 0
        churn/entered 0.0 0
        churn/left 0.0 0
        survivors/weight 0.5 0
        entered/weight 0.0 0
    """
    instance(look, Look, "history.looks")
    values = {"sparsity/rate": look.rate, "sparsity/threshold": look.threshold}
    values |= {"churn/entered": look.entered / max(1, look.survivors), "churn/left": look.left / max(1, look.survivors)}
    for layer in look.layers:
        values[f"survivors/{layer.name}"] = layer.survivors / max(1, layer.total)
        values[f"entered/{layer.name}"] = layer.entered / max(1, layer.survivors)
    for tag, value in values.items():
        writer.add_scalar(tag, value, look.step)


def add_multiply_adds(writer: ScalarWriter, counted: MultiplyAdds, step: int) -> None:
    """Write the fraction of multiply-adds left, as ``multiply_adds/left`` and ``multiply_adds/NAME``."""
    instance(counted, MultiplyAdds, "multiply_adds(model, input)")
    writer.add_scalar("multiply_adds/left", counted.left / max(1, counted.dense), step)
    for row in counted.rows:
        writer.add_scalar(f"multiply_adds/{row.name}", row.left / max(1, row.dense), step)

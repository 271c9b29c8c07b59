"""Loggers of TensorBoard, wandb and mlflow get the scalars of the reports. wandb and mlflow have stand-ins."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from feather_param.reports import scalars

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reports.md"


def log_all(log, reports) -> None:
    report, history, counted = reports
    scalars.log_report(log, report, 99)
    for record in history.records:
        scalars.log_record(log, record)
    scalars.log_multiply_adds(log, counted, 12)


def test_tensorboard_reads_what_was_logged(tmp_path, reports):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard.writer import SummaryWriter

    report, history, counted = reports
    with SummaryWriter(str(tmp_path)) as writer:
        log_all(writer.add_scalar, reports)
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()

    def read(tag: str) -> list[tuple[int, float]]:
        return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(tag)]

    assert read("sparsity/rate") == [(record.step, record.rate) for record in history.records]
    assert read("sparsity/threshold") == [(record.step, record.threshold) for record in history.records]
    assert read("churn/left") == [(record.step, record.left / record.survivors) for record in history.records]
    assert read("churn/entered") == [(record.step, record.entered / record.survivors) for record in history.records]
    kept = [(record.step, record.layers[1].survivors / 1050) for record in history.records]
    assert sorted(read("survivors/4.weight"), key=lambda item: item[0]) == [*kept, (99, 1 - report.rows[1].rate)]
    assert read("multiply_adds/remaining") == [(12, counted.remaining / counted.dense)]
    assert read("multiply_adds/0.weight") == [(12, counted.rows[0].remaining / counted.rows[0].dense)]


class WandbStandIn:
    """It has the signature of `wandb.log`, as far as the page uses it."""

    def __init__(self, logged: list) -> None:
        self.logged = logged

    def log(self, data: dict[str, float], step: int | None = None, commit: bool | None = None) -> None:
        self.logged.extend((name, value, step) for name, value in data.items())


class MlflowStandIn:
    """It has the signature of `mlflow.log_metric`, and its rule for names."""

    def __init__(self, logged: list) -> None:
        self.logged = logged

    def log_metric(self, key: str, value: float, step: int | None = None, synchronous: bool | None = None) -> None:
        assert re.fullmatch(r"[/\w.\- :]*", key)
        self.logged.append((key, value, step))


def loggers_of_the_page() -> dict[str, str]:
    """Return the lines of docs/reports.md that make a logger, by tool."""
    lines = re.findall(r"^log = (.*?)  # (\w+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {tool: line for line, tool in lines}


@pytest.mark.parametrize("tool", ["TensorBoard", "wandb", "mlflow"])
def test_the_line_of_the_page_makes_a_logger(tool, reports):
    expected, logged = [], []
    log_all(lambda *scalar: expected.append(scalar), reports)
    writer = SimpleNamespace(
        add_scalar=lambda tag, scalar_value, global_step=None: logged.append((tag, scalar_value, global_step))
    )
    scope = {"writer": writer, "wandb": WandbStandIn(logged), "mlflow": MlflowStandIn(logged)}
    log_all(eval(loggers_of_the_page()[tool], scope), reports)
    assert logged == expected
    assert len(expected) > 10


def test_a_writer_in_the_place_of_a_logger_is_refused(reports):
    report, history, counted = reports
    writer = SimpleNamespace(add_scalar=print)
    for call in (
        lambda: scalars.log_report(writer, report, 1),
        lambda: scalars.log_record(writer, history.records[0]),
        lambda: scalars.log_multiply_adds(writer, counted, 1),
    ):
        with pytest.raises(
            TypeError, match=r"expected log to be a function .*SimpleNamespace; pass its method add_scalar"
        ):
            call()
    with pytest.raises(TypeError, match=r"got NoneType$"):
        scalars.log_report(None, report, 1)

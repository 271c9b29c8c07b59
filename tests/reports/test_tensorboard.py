"""TensorBoard reads the scalars that were written."""

from __future__ import annotations

import pytest

from feather_param.reports import tensorboard


def test_tensorboard_reads_what_was_written(tmp_path, reports):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard.writer import SummaryWriter

    report, history, counted = reports
    with SummaryWriter(str(tmp_path)) as writer:
        tensorboard.add_report(writer, report, 99)
        for record in history.records:
            tensorboard.add_record(writer, record)
        tensorboard.add_multiply_adds(writer, counted, 12)
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

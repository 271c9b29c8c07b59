"""A history counts the survivors, and those that entered and left since the record before."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import feather_param
from feather_param.reports import History
from tests.reports.models import loss, started
from tests.training import train


def alive(model: nn.Module) -> dict[str, set[int]]:
    """Return the positions of the survivors, one by one."""
    plain = copy.deepcopy(model)
    feather_param.desparsify(plain)
    weights = {"0.weight": plain[0].weight, "4.weight": plain[4].weight}
    return {name: {i for i, v in enumerate(weight.flatten().tolist()) if v != 0} for name, weight in weights.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stop", [None, 0, 3, 7])
def test_records_equal_those_of_a_slow_twin_also_when_resumed(dtype, stop):
    model, optimizer, controller = started(dtype=dtype)
    history = History(controller)
    before = alive(model)
    expected = [(0, 0.0, before, before)]
    for step in range(12):
        if step == stop:
            file = io.BytesIO()
            torch.save([thing.state_dict() for thing in (model, optimizer, controller, history)], file)
            file.seek(0)
            model, optimizer, controller = started(seed=9, dtype=dtype)
            history = History(controller)
            for thing, state in zip((model, optimizer, controller, history), torch.load(file), strict=True):
                thing.load_state_dict(state)
        train(model, loss, controller, [step], optimizer)
        if step % 2:
            record, now = history.record(), alive(model)
            assert record is history.records[-1]
            expected.append((step + 1, controller.rate, before, now))
            before = now
    total = 6 * 3 * 9 + 7 * 150
    assert len(history.records) == len(expected)
    for record, (step, rate, before, now) in zip(history.records, expected, strict=True):
        assert (record.step, record.rate, record.total) == (step, rate, total)
        assert record.survivors == total - round(rate * total)
        assert [(layer.name, layer.survivors, layer.entered, layer.left, layer.total) for layer in record.layers] == [
            (name, len(now[name]), len(now[name] - before[name]), len(before[name] - now[name]), size)
            for name, size in (("0.weight", 162), ("4.weight", 1050))
        ]
        assert record.entered - record.left == sum(len(now[name]) - len(before[name]) for name in now)
    assert any(record.entered for record in history.records)  # else nothing was compared
    assert history.records[-1].threshold == float(controller.threshold)


def test_frozen_masks_have_no_churn():
    model, optimizer, controller = started()
    history = History(controller)
    train(model, loss, controller, range(8), optimizer)
    controller.freeze()
    assert history.record().left
    train(model, loss, controller, range(8, 12), optimizer)
    assert (history.record().entered, history.records[-1].left) == (0, 0)


def test_history_takes_one_bit_a_weight():
    controller = feather_param.sparsify(nn.Linear(1000, 101), final_rate=0.5, total_steps=4)
    masks = History(controller).state_dict()["masks"]
    assert sum(mask.nbytes for mask in masks.values()) == -(-101_000 // 8)


def test_history_counts_a_tied_weight_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    history = History(feather_param.sparsify(model, final_rate=0.5, total_steps=4, end_step=0))
    assert [(layer.name, layer.total, layer.survivors) for layer in history.records[0].layers] == [("0.weight", 64, 32)]


def test_history_refuses_the_state_of_another_model():
    history = History(feather_param.sparsify(nn.Linear(4, 4), final_rate=0.5, total_steps=4))
    other = History(feather_param.sparsify(nn.Linear(4, 5), final_rate=0.5, total_steps=4))
    before = history.state_dict()
    for state, message in [
        ({}, "expected the state_dict of a History, got something else"),
        ([1], "expected the state_dict of a History, got something else"),
        ({**before, "version": 9}, "expected a history state of version 1, got 9"),
        (other.state_dict(), r"got another's: weight has shape \[4, 4\] here and \[5, 4\] there"),
    ]:
        with pytest.raises(ValueError, match=message):
            history.load_state_dict(state)
    assert str(history.state_dict()) == str(before)


def test_history_refuses_what_is_no_controller():
    with pytest.raises(TypeError, match="expected the controller that sparsify returns, got Linear"):
        History(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_history_reads_nothing_but_four_attributes():
    mask = torch.tensor([True, False, True])
    controller = SimpleNamespace(step_count=3, rate=0.5, threshold=torch.tensor(2.0), masks=lambda: {"w": mask})
    record = History(controller).records[0]
    assert (record.step, record.rate, record.threshold, record.survivors, record.total) == (3, 0.5, 2.0, 2, 3)


def test_history_ends_with_desparsify():
    model, optimizer, controller = started()
    history = History(controller)
    train(model, loss, controller, range(12), optimizer)
    feather_param.desparsify(model)
    with pytest.raises(RuntimeError, match=r"expected masks\(\) before desparsify"):
        history.record()
    assert len(history.records) == 1

"""The replaced survivors and the starving layers of each epoch."""

from __future__ import annotations

import pytest

from benchmarks.cifar100_run import Run
from benchmarks.methods import DENSE
from benchmarks.turnover import table, train
from examples.images import ImageData


def a_run(method: str) -> Run:
    return Run("resnet20", 2, method, 0.99, seed=0, epochs=4, train_size=None)


def test_each_epoch_has_its_figures(data: ImageData) -> None:
    figures = train(a_run("feather"), data)
    assert all(len(figures[key]) == 4 for key in ("rate", "replaced", "smallest", "starving"))
    assert figures["rate"][1:] == [0.99] * 3
    assert all(0 <= value <= 1 for value in figures["replaced"])
    # 43 of 4,324 weights survive in 22 layers, some of which starve
    assert all(least < 1 for least in figures["smallest"][1:])
    assert all(0 < number <= 22 for number in figures["starving"][1:])
    assert 0 <= figures["accuracy"] <= 1


def test_a_dense_network_is_refused(data: ImageData) -> None:
    with pytest.raises(ValueError, match="expected a method that prunes, got 'dense'; choose one of feather, hard, "):
        train(a_run(DENSE), data)


def test_the_table_shows_the_epochs_in_which_the_rate_is_constant() -> None:
    figures = {
        "rate": [0.5, 0.9, 0.9, 0.9],
        "replaced": [0.9, 0.8, 0.3, 0.1],
        "smallest": [5.0, 2.0, 1.0, 0.25],
        "starving": [0, 0, 0, 2],
        "accuracy": 0.5,
    }
    row = table({"soft": figures}).splitlines()[-1]
    assert row.endswith("| 30.0 | 20.0 | 10.0 | 2.00 | 0.25 | 2 | 50.00 |")

"""Which runs a GPU makes first, and how many at once."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.gpu.order import papers_runs, starving, telling_runs, winner
from benchmarks.gpu.speeds import Choice, Speed, choose, speeds
from benchmarks.methods import DENSE
from tests.benchmarks.results import made_up

STEPS = 62_400


def made(network: str, method: str, rate: float, accuracy: float, seed: int = 0, survivors: int = 9) -> dict[str, Any]:
    layers = [{"name": "fc", "size": 100, "survivors": survivors, "outputs": 10}]
    result = made_up(method, rate, seed, accuracy, layers=layers)
    result["run"]["network"] = network
    return result


def test_the_telling_runs_are_in_the_order_of_their_worth():
    runs = telling_runs([])
    assert len(runs) == len(set(runs))
    assert {(run.width, run.epochs, run.train_size) for run in runs} == {(0, 160, None)}
    cells = [(run.network, run.rate) for run in runs]
    names = [*dict.fromkeys(cells)]
    mobile, resnet = "mobilenet_v1", "resnet20"
    assert names[:4] == [(mobile, 0.995), (mobile, 0.98), (resnet, 0.995), (resnet, 0.98)]
    assert names[4:8] == [(mobile, 0.99), (resnet, 0.99), (mobile, 0.0), (resnet, 0.0)]
    assert names[8:] == [(mobile, 0.9), (mobile, 0.95), (resnet, 0.9), (resnet, 0.95)]
    assert [run.method for run in runs[:6]] == ["feather", "soft", "p_0.5"] * 2
    one = len(runs) // 3
    assert [run.seed for run in runs] == [0] * one + [1] * one + [2] * one
    assert {run.method for run in runs} == {DENSE, "feather", "soft", "p_0.5"}


def test_the_winner_is_tried_at_low_rates_beside_p_3():
    results = [made("mobilenet_v1", "feather", 0.98, 0.5), made("mobilenet_v1", "soft", 0.98, 0.6)]
    runs = telling_runs(results)
    assert {run.method for run in runs if run.rate in (0.9, 0.95)} == {"feather", "soft"}
    assert {run.method for run in telling_runs([]) if run.rate in (0.9, 0.95)} == {"feather"}


def test_only_cells_that_all_methods_have_decide_the_winner():
    cell = {"feather": 0.50, "soft": 0.52, "p_0.5": 0.51}
    results = [made("mobilenet_v1", method, 0.98, accuracy) for method, accuracy in cell.items()]
    easy = made("resnet20", "feather", 0.98, 0.9)
    other_rate = [made("resnet20", method, 0.9, 0.9 - accuracy) for method, accuracy in cell.items()]
    assert winner([*results, easy, *other_rate]) == "soft"
    assert winner([]) is None
    assert winner([easy]) == "feather"


@pytest.mark.parametrize(("survivors", "hungry"), [(9, True), (10, False)])
def test_square_root_follows_where_p_3_starves_a_layer_at_98_percent(survivors, hungry):
    results = [made("resnet20", "feather", 0.98, 0.5, survivors=survivors)]
    results += [made("resnet20", "soft", 0.98, 0.5, survivors=1), made("resnet20", "feather", 0.995, 0.5, survivors=1)]
    assert starving(results, "resnet20") == hungry
    assert not starving(results, "mobilenet_v1")
    found = [run for run in telling_runs(results) if run.method == "square_root"]
    assert [(run.network, run.rate, run.seed) for run in found] == [
        ("resnet20", rate, seed) for seed in range(3) for rate in (0.995, 0.98) if hungry
    ]


def test_the_papers_table_begins_with_resnet_20_and_p_3():
    runs = papers_runs([])
    assert len(runs) == len(set(runs)) == 3 * 3 * (1 + 5 * 7)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert [*dict.fromkeys(run.network for run in runs)] == ["resnet20", "mobilenet_v1", "densenet"]
    methods = [*dict.fromkeys(run.method for run in runs)]
    assert methods == ["feather", DENSE, "hard", "soft", "theta_1", "theta_0.5", "one_shot", "gradual"]


def record(count: int, compiled: bool, step: float, **changes: Any) -> dict[str, Any]:
    figures = {"network": "resnet20", "count": count, "compiled": compiled, "captured": True}
    figures |= {"sparse": {"step": step, "epoch": 390 * step}}
    return {"figures": {**figures, **changes}, "machine": {"gpu": "NVIDIA H100"}}


def test_the_speeds_are_those_that_were_measured_on_this_gpu():
    measured = {
        "a": record(8, False, 1.2e-3),
        "b": record(1, False, 3e-3),
        "c": record(8, True, 0.9e-3),
        "d": record(1, False, 0.1e-3, captured=False),
        "e": record(8, False, 0.1e-3, network="mobilenet_v1"),
        "f": {"expected": 12.0, "left": 3.0},
    }
    found = speeds(measured, "resnet20", "NVIDIA H100", 8)
    assert found == [Speed(3e-3, 1.2e-3, 8, False, 1.08), Speed(0.9e-3, 0.9e-3, 8, True, 1.08)]
    assert [speed.count for speed in speeds(measured, "resnet20", "NVIDIA H100", 4)] == [4, 4]
    assert speeds(measured, "resnet20", "NVIDIA H200", 8) == [Speed(2.9e-3, 1.7e-3, 8)]


def test_a_few_networks_take_as_long_as_one():
    speed = Speed(3e-3, 1e-3, 8)
    assert [speed.step(count) for count in (1, 2, 3, 8)] == [3e-3, 3e-3, 3e-3, 8e-3]
    assert [Speed(3e-3, step, 8).as_one for step in (3.1e-3, 1.4e-3, 0.1e-3)] == [1, 2, 8]


def test_the_largest_group_that_ends_in_time_is_chosen():
    eager, compiled = Speed(3e-3, 1e-3, 8, margin=1.0), Speed(3e-3, 0.8e-3, 8, compiled=True, margin=1.0)
    assert choose([eager], 20, STEPS, 1e9, False) == Choice(8, eager, 10 + STEPS * 8e-3)
    assert choose([eager], 5, STEPS, 1e9, False) == Choice(5, eager, 10 + STEPS * 5e-3)
    assert choose([eager], 20, STEPS, 10 + STEPS * 4e-3, False) == Choice(4, eager, 10 + STEPS * 4e-3)
    assert choose([eager], 20, STEPS, 100, False) is None
    assert choose([Speed(3e-3, 1e-3, 8, margin=2.0)], 1, STEPS, 1.9 * (10 + STEPS * 3e-3), False) is None
    # A compilation takes 45 s once, and 8 networks gain 100 s by it, but 3 networks nothing.
    assert choose([eager, compiled], 20, STEPS, 1e9, False) == Choice(8, compiled, 55 + STEPS * 8 * 0.8e-3)
    assert choose([eager, compiled], 3, STEPS, 1e9, False) == Choice(3, eager, 10 + STEPS * 3e-3)

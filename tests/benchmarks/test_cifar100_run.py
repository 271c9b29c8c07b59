"""A run of the CIFAR-100 table: interruptions do not change its result, and its file says what survived."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import timing, together
from benchmarks.cifar100_run import Run, RunTraining, build, content, execute
from benchmarks.methods import DENSE, METHODS
from examples.images import ImageData
from examples.lock import BusyError
from tests.examples.locks import held

CPU = torch.device("cpu")


def a_run(method: str, rate: float = 0.8, seed: int = 0) -> Run:
    return Run("resnet20", 2, method, 0.0 if method == DENSE else rate, seed, epochs=2, train_size=None)


def result(run: Run, folder: Path) -> dict[str, Any]:
    content = run.done(folder)
    assert content is not None
    return {key: value for key, value in content.items() if key not in ("seconds", "machine")}


def uninterrupted(run: Run, data: ImageData, folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    steps: list[int] = []
    assert execute(run, data, CPU, folder, steps.append, lambda: False)
    assert sum(steps) == 2 * 3
    return result(run, folder)


@pytest.mark.parametrize("method", [DENSE, *METHODS])
def test_an_interrupted_run_continues_to_the_same_result(method, data, tmp_path):
    run = a_run(method)
    whole = uninterrupted(run, data, tmp_path / "whole")
    assert whole["zeros"] == whole["promised"] == round(run.rate * whole["total"])
    again = tmp_path / "again"
    again.mkdir()
    steps: list[int] = []
    for stop in (2, 4):  # before and after one_shot freezes its mask
        assert not execute(run, data, CPU, again, steps.append, lambda stop=stop: sum(steps) == stop)
        assert run.done(again) is None
        steps[:] = []
    assert execute(run, data, CPU, again, steps.append, lambda: False)
    assert steps == [4, 1, 1]
    assert result(run, again) == whole
    assert [path.suffix for path in again.iterdir()] == [".json"]


@pytest.mark.skipif(os.name == "nt", reason="no lockf")
def test_a_run_that_another_process_makes_is_left_to_it(data, tmp_path):
    run = a_run(DENSE)
    for path, make in (
        (tmp_path / f"{run.name}.checkpoint.pt", lambda: execute(run, data, CPU, tmp_path, print, lambda: False)),
        (together._checkpoint([run], tmp_path), lambda: together.execute([run], data, CPU, tmp_path)),
    ):
        with held(path), pytest.raises(BusyError, match=r"which process [0-9]+ on .* trains: stop that process"):
            make()
    assert not list(tmp_path.glob("*.json"))


def test_methods_differ_where_they_should(data, tmp_path):
    losses = {method: uninterrupted(a_run(method), data, tmp_path / method)["loss"] for method in METHODS}
    same = {frozenset({"feather", "theta_1"})}  # theta is 1 up to a rate of 0.95
    for one in losses:
        for other in losses:
            if one < other and losses[one] == losses[other]:
                assert frozenset({one, other}) in same | {frozenset({name, "theta_late"}) for name in losses}


def test_a_result_of_other_settings_is_refused(data, tmp_path):
    run = a_run("feather")
    uninterrupted(run, data, tmp_path)
    with pytest.raises(ValueError, match=r"expected the settings .*'epochs': 3.* in .*; move it away"):
        replace(run, epochs=3).done(tmp_path)


@pytest.mark.parametrize(("network", "width", "first"), [("resnet20", 16, 16), ("resnet20", 0, 32)])
def test_the_width_of_a_resnet_is_the_number_of_its_first_channels(network, width, first):
    assert build(replace(a_run(DENSE), network=network, width=width), 10, 3).conv.out_channels == first


@pytest.mark.parametrize(("width", "first"), [(0.5, 16), (0, 32)])
def test_the_width_of_a_mobilenet_is_a_multiplier(width, first):
    assert build(replace(a_run(DENSE), network="mobilenet_v1", width=width), 10, 3).conv.out_channels == first


def test_a_width_of_a_densenet_is_refused():
    with pytest.raises(ValueError, match="expected width 0 for densenet, got 2; only resnet20 and mobilenet_v1 have"):
        build(replace(a_run(DENSE), network="densenet"), 10, 3)


def test_the_content_lists_the_survivors_and_outputs_of_each_layer():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(12, 5))
    with torch.no_grad():
        model[0].weight.zero_()
        model[2].weight[:, 1:] = 0
    machine = timing.machine()
    found = content(replace(a_run("feather"), rate=0.9), model, 0.75, 1.5, 12.34, machine)
    assert found["layers"] == [
        {"name": "0.weight", "size": 6, "survivors": 0, "outputs": 3},
        {"name": "2.weight", "size": 60, "survivors": 5, "outputs": 5},
    ]
    assert (found["zeros"], found["total"], found["promised"]) == (61, 66, round(0.9 * 66))
    assert (found["accuracy"], found["loss"], found["seconds"], found["dead"]) == (0.75, 1.5, 12.3, ["0.weight"])
    assert found["run"]["method"] == "feather"
    assert found["machine"] == machine


def test_a_moving_average_is_the_network_that_is_saved(data, tmp_path):
    average, trained = (uninterrupted(a_run(method), data, tmp_path / method) for method in ("ema", "feather"))
    assert average["zeros"] == trained["zeros"] == average["promised"]
    assert average["loss"] != trained["loss"]
    assert average["layers"] != trained["layers"]


@pytest.mark.parametrize(("network", "amp"), [("resnet20", True), ("mobilenet_v1", False)])
def test_a_mobilenet_on_a_cpu_computes_in_float32(network, amp, data):
    assert RunTraining(replace(a_run("feather"), network=network, width=1), data, CPU).amp is amp

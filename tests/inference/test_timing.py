"""Layers and networks are timed in turns, and the shortest time counts."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from feather_param.inference import timing


class Clock:
    """A clock that calls move on. Each call may be delayed, as on a machine that does other work."""

    def __init__(self, monkeypatch, delay=lambda: 1.0):
        self.now, self.delay, self.order = 0.0, delay, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def lasting(self, name, seconds):
        def call(*_):
            self.order.append(name)
            self.now += seconds * self.delay()

        return call


def test_calls_alternate_within_the_budget(monkeypatch):
    clock = Clock(monkeypatch)
    calls = {"dense": clock.lasting("a", 2.0), "sparse": clock.lasting("b", 1.0)}
    assert timing.seconds_of(calls, budget=0.1) == {"dense": 2.0, "sparse": 1.0}
    assert clock.order == ["a", "b"] * 3
    clock.order.clear()
    timing.seconds_of(calls, budget=15.0)
    assert clock.order == ["a", "b"] * 5
    clock.order.clear()
    timing.seconds_of({"dense": clock.lasting("a", 1e-3)}, budget=8.0)
    assert clock.order == ["a"] * 50


@pytest.mark.parametrize(("sparse", "rounds"), [(0.4, 3), (0.6, 30), (1.9, 17), (2.1, 3)])
def test_a_clear_outcome_stops_early(monkeypatch, sparse, rounds):
    clock = Clock(monkeypatch)
    calls = {"dense": clock.lasting("a", 1.0), "sparse": clock.lasting("b", sparse)}
    timing.seconds_of(calls, budget=47.9, stop_if_clear=True)
    assert clock.order == ["a", "b"] * rounds


def test_the_shortest_time_counts(monkeypatch):
    delays = iter([1.0, 1.0, 3.0, 2.0, 5.0, 1.0])
    clock = Clock(monkeypatch, lambda: next(delays))
    calls = {"dense": clock.lasting("a", 1.0), "sparse": clock.lasting("b", 0.9)}
    assert timing.seconds_of(calls, budget=0.0) == pytest.approx({"dense": 1.0, "sparse": 0.9})


class Timed(nn.Linear):
    """A layer that takes a given time."""

    def __init__(self, call):
        super().__init__(2, 2)
        self.call = call

    def forward(self, input):
        self.call()
        return super().forward(input)


# A sparse layer that takes less than 0.9 of the time wins.
@pytest.mark.parametrize(("sparse", "wins"), [(0.7, True), (1.05, False), (0.3, True), (3.0, False)])
@pytest.mark.parametrize("often", [0.3, 0.6])
def test_the_choice_is_right_on_a_loaded_machine(monkeypatch, sparse, wins, often):
    """Some calls take up to 5 times as long. The choice is right in nearly all trials."""
    right = 0
    for seed in range(200):
        chance = random.Random(seed)
        delay = lambda: 1.0 + 4.0 * chance.random() if chance.random() < often else 1.0  # noqa: B023, E731
        clock = Clock(monkeypatch, delay)
        trial = timing.Trial(Timed(clock.lasting("a", 1e-3)), lambda _: Timed(clock.lasting("b", 1e-3 * sparse)))  # noqa: B023
        trial(torch.zeros(1, 2))
        right += trial.wins is wins
        if wins and trial.wins:
            assert trial.sparse is not None
    assert right >= 190


def test_a_trial_returns_the_dense_output_and_adds_up_its_calls(clock):
    layer = nn.Linear(3, 3)
    trial = timing.Trial(layer, lambda dense: nn.Sequential(dense))
    x = torch.randn(2, 3)
    assert not trial.called
    assert not trial.wins
    with torch.no_grad():
        assert torch.equal(trial(x), layer(x))
        trial(input=x)
    assert (trial.dense_seconds, trial.sparse_seconds) == (2.0, 1.0)
    assert trial.called
    assert trial.wins


def test_a_sparse_layer_that_loses_is_not_kept(clock):
    clock["sparse"] = 0.95
    trial = timing.Trial(nn.Linear(3, 3), lambda dense: nn.Sequential(dense))
    trial(torch.randn(2, 3))
    assert not trial.wins
    assert trial.sparse is None


def test_a_sparse_layer_that_fails_loses(clock):
    trial = timing.Trial(nn.Linear(3, 3), lambda _: nn.Linear(4, 3))
    trial(torch.randn(2, 3))
    trial(torch.randn(2, 3))
    assert trial.called
    assert not trial.wins
    assert trial.error.startswith("mat1 and mat2 shapes cannot be multiplied")


def test_the_layers_are_as_before_after_the_trials(clock):
    layers = nn.Linear(3, 3), nn.Linear(3, 3)
    trials = [timing.Trial(layer, lambda dense: nn.Sequential(dense)) for layer in layers]
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        timing.run_trials(trials, lambda: layers[0](torch.randn(2, 4)))
    assert all("forward" not in vars(layer) for layer in layers)

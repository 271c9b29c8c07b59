"""Fixtures for the tests of sparse inference."""

from __future__ import annotations

import pytest

from feather_param.inference import timing


@pytest.fixture
def clock(monkeypatch):
    """Return the seconds that will be measured for a "dense", a "fused" and a "sparse" layer or network."""
    times = {"dense": 1.0, "fused": 0.9, "sparse": 0.5}

    def seconds(calls, budget=0.0, *, stop_if_clear=False):
        for call in calls.values():
            call()
        return {name: times[name] for name in calls}

    monkeypatch.setattr(timing, "seconds_of", seconds)
    return times

"""Fixtures for the tests of sparse inference."""

from __future__ import annotations

import sys

import pytest

from feather_param.inference import kernel, timing


@pytest.fixture
def without_numba(monkeypatch):
    """Pretend that numba is not installed."""
    monkeypatch.setitem(sys.modules, "numba", None)
    kernel.compiled.cache_clear()
    yield
    kernel.compiled.cache_clear()


@pytest.fixture
def clock(monkeypatch):
    """Return the seconds that will be measured for "dense", "csr" and "kernel" layers and the "sparse" network."""
    times = {"dense": 1.0, "csr": 0.5, "kernel": 0.5, "sparse": 0.5}

    def seconds(calls, budget):
        for call in calls.values():
            call()
        return {name: [times[name]] * 3 for name in calls}

    monkeypatch.setattr(timing, "seconds_of", seconds)
    return times

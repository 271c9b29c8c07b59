"""Timing alternates between the methods within its budget."""

from __future__ import annotations

from feather_param.inference import timing


def test_methods_alternate_within_the_budget(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    order = []

    def lasting(name, seconds):
        def call():
            order.append(name)
            now[0] += seconds

        return call

    measured = timing.seconds_of({"dense": lasting("a", 2.0), "csr": lasting("b", 1.0)}, budget=0.1)
    assert measured == {"dense": [2.0] * 5, "csr": [1.0] * 5}
    assert order == ["a", "b"] * 6
    assert len(timing.seconds_of({"dense": lasting("a", 0.5), "csr": lasting("b", 0.5)}, budget=8.0)["dense"]) == 8
    assert len(timing.seconds_of({"dense": lasting("a", 1e-3)}, budget=8.0)["dense"]) == 50

"""Results do not depend on the number of threads."""

from __future__ import annotations

import pytest
import torch

from feather_param.ops import threads
from feather_param.ops.kth import kth_magnitude
from feather_param.parametrizations import feather_threshold


def test_the_kth_magnitude_does_not_depend_on_the_number_of_threads(monkeypatch):
    weights = {"a": torch.randn(300_000), "b": torch.randn(500, 700)}
    expected = kth_magnitude(weights, 400_000)
    monkeypatch.setattr(threads, "_MIN_ELEMENTS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(kth_magnitude(weights, 400_000), expected)


@pytest.mark.parametrize("theta", [1.0, 0.5])
def test_the_operator_does_not_depend_on_the_number_of_threads(theta, monkeypatch):
    weight = torch.randn(900_001)
    expected = feather_threshold(weight, torch.tensor(1.5), theta, p=1.0)
    monkeypatch.setattr(threads, "_MIN_ELEMENTS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(feather_threshold(weight, torch.tensor(1.5), theta, p=1.0), expected)

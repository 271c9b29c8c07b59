"""The guards of the weights, as numbers of zeros."""

from __future__ import annotations

from feather_param.core.budget import Budget


def test_guards_are_exact_fractions_of_the_sizes():
    assert Budget({"a": 100}, max_rate=0.29).guards == {"a": 29}
    assert Budget({"a": 7, "b": 3}, min_nonzero=5).guards == {"a": 2, "b": 0}
    assert Budget({"a": 3_000_000_000}, max_rate=0.9999).guards == {"a": 2_999_700_000}

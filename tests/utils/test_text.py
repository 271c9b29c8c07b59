"""Numbers of three digits, and lines for several names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import feather_param
from feather_param.utils import text as tables


@given(st.integers(0, 10**18))
def test_short_numbers_are_right_to_three_digits(count):
    text = tables.short(count)
    unit = " kMGTP".find(text[-1]) if not text[-1].isdigit() else 0
    value = float(text.rstrip("kMGTP")) * 1000**unit
    assert value == pytest.approx(count, rel=0.005)
    assert len(text) <= 5 or count >= 10**17


def test_names_that_differ_only_in_a_number_are_put_on_one_line():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Embedding(2, 4)) for _ in range(12)), nn.Embedding(3, 3))
    reason = "a weight of Embedding: name it in include to prune it"
    plan = feather_param.plan(model, final_rate=0.5)
    assert len(plan.skipped) == 13
    lines = [f"dense: 0..11.1.weight (12 weights: {reason})", f"dense: 12.weight ({reason})"]
    assert str(plan).splitlines()[-3:-1] == lines
    report = feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0).report()
    assert str(report).splitlines()[-2:] == lines

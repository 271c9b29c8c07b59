"""Numbers of three digits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feather_param.utils import text as tables


@given(st.integers(0, 10**18))
def test_short_numbers_are_right_to_three_digits(count):
    text = tables.short(count)
    unit = " kMGTP".find(text[-1]) if not text[-1].isdigit() else 0
    value = float(text.rstrip("kMGTP")) * 1000**unit
    assert value == pytest.approx(count, rel=0.005)
    assert len(text) <= 5 or count >= 10**17

"""A whole number, split in proportion to ratios and within bounds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feather_param.utils.split import split
from tests import twins

RATIOS = st.sampled_from([0.0, 1.0, 2.0, 3.0, 10.0, 0.1, 1e6]) | st.floats(1e-3, 1e3)


@st.composite
def problems(draw):
    """Draw ratios with bounds; the parts with the ratio 0 cannot grow."""
    names = [str(i) for i in range(draw(st.integers(1, 6)))]
    ratios = {name: draw(RATIOS) for name in names}
    least = {name: draw(st.integers(0, 4)) for name in names}
    most = {name: least[name] + draw(st.integers(0, 12)) for name in names}
    return ratios, least, most


@given(problem=problems())
@settings(max_examples=300)
def test_every_total_equals_that_of_adding_one_by_one(problem):
    ratios, least, most = problem
    room = sum(most[name] - least[name] for name in ratios if ratios[name])
    for total in range(sum(least.values()), sum(least.values()) + room + 1):
        parts = split(total, ratios, least, most)
        assert parts == twins.split(total, ratios, least, most)  # so no part shrinks when the total grows
        assert sum(parts.values()) == total
        assert all(least[name] <= parts[name] <= most[name] for name in ratios)


def test_equal_parts_grow_in_order():
    names = dict.fromkeys("abc", 1.0)
    assert split(4, names, dict.fromkeys("abc", 0), dict.fromkeys("abc", 9)) == {"a": 2, "b": 1, "c": 1}
    assert split(5, names, dict.fromkeys("abc", 0), dict.fromkeys("abc", 9)) == {"a": 2, "b": 2, "c": 1}


def test_large_numbers_are_split_exactly():
    sizes = {str(i): 10**9 + i for i in range(50)}
    parts = split(
        10**10 + 7, {name: float(size) ** 0.5 for name, size in sizes.items()}, dict.fromkeys(sizes, 0), sizes
    )
    assert sum(parts.values()) == 10**10 + 7
    assert max(parts.values()) - min(parts.values()) <= 11  # the roots differ by 2.5e-8 of themselves, 5 of 2e8


@pytest.mark.parametrize("total", [1, 8])
def test_a_total_outside_of_the_bounds_is_refused(total):
    with pytest.raises(ValueError, match=f"expected a total from 2 to 7, got {total}"):
        split(total, {"a": 1.0, "b": 0.0}, {"a": 1, "b": 1}, {"a": 6, "b": 9})

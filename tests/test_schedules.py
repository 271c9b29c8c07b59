"""The schedules: their values and bounds."""

import pytest

from feather_param import schedules

TABLE = [
    (schedules.cubic, [0.0, 0.578125, 0.875, 0.984375, 1.0]),
    (schedules.linear, [0.0, 0.25, 0.5, 0.75, 1.0]),
    (schedules.constant, [1.0, 1.0, 1.0, 1.0, 1.0]),
]


@pytest.mark.parametrize(("schedule", "expected"), TABLE)
def test_a_schedule_has_the_values_of_its_formula(schedule, expected):
    assert [schedule(i / 4) for i in range(5)] == expected


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in TABLE])
def test_a_schedule_never_decreases_and_stays_between_0_and_1(schedule):
    values = [schedule(i / 1000) for i in range(1001)]
    assert values == sorted(values)
    assert 0.0 <= values[0] <= values[-1] == 1.0

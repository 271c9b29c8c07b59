"""Groups of weights: their thresholds, counts and masks."""

from __future__ import annotations

import math

import pytest
import torch

from feather_param.core.position import Position
from feather_param.ops.groups import Group, count_zeros, group_each, masks
from feather_param.ops.kth import kth_magnitudes
from feather_param.ops.kth_gpu import kth_by_bits
from tests import twins

WEIGHTS = {
    "float64": torch.randn(40, 5, dtype=torch.float64),
    "bfloat16": torch.randn(30).bfloat16(),
    "ties": torch.tensor([1.0, 1.0, 1.0, 2.0]),
    "zeros": torch.zeros(7),
    "empty": torch.zeros(0, 3),
}
ZEROS = {"float64": 150, "bfloat16": 0, "ties": 2, "zeros": 3, "empty": 0}


def test_each_weight_has_a_threshold_of_its_own():
    groups = group_each(WEIGHTS, ZEROS)
    assert [(group.names, group.zeros) for group in groups] == [((name,), k) for name, k in ZEROS.items()]
    for name, group in zip(WEIGHTS, groups, strict=True):
        assert float(group.threshold) == twins.threshold([WEIGHTS[name]], ZEROS[name])
        assert group.threshold.dtype == (torch.float64 if name == "float64" else torch.float32)
    counts, found = count_zeros(WEIGHTS, groups), masks(WEIGHTS, groups)
    assert [count.zeros for count in counts.values()] == [*ZEROS.values()]
    assert (counts["ties"].ties, counts["zeros"].ties) == (1, 4)  # four elements that are zero are kept
    assert [int((~mask).sum()) for mask in found.values()] == [*ZEROS.values()]
    assert found["ties"].tolist() == [False, False, True, True]


def test_all_elements_that_are_zero_are_pruned_if_there_are_more_of_them_than_zeros():
    zeros = {"float64": 0, "bfloat16": 0, "ties": 2, "zeros": 3, "empty": 0}
    groups = group_each(WEIGHTS, zeros)
    assert [count.zeros for count in count_zeros(WEIGHTS, groups).values()] == [0, 0, 2, 7, 0]
    assert [int((~mask).sum()) for mask in masks(WEIGHTS, groups).values()] == [0, 0, 2, 7, 0]


@pytest.mark.parametrize("add_up", [None, lambda counts: counts], ids=["alone", "with other processes"])
def test_the_magnitudes_of_several_weights_equal_those_of_each(add_up):
    found = kth_magnitudes(WEIGHTS, ZEROS, add_up)
    for name, k in ZEROS.items():
        assert float(found[name]) == twins.threshold([WEIGHTS[name]], k)


def test_processes_exchange_counts_as_often_for_many_weights_as_for_one():
    weights = {str(i): torch.randn(10) for i in range(20)}
    calls = []
    kth_magnitudes(weights, dict.fromkeys(weights, 3), lambda counts: calls.append(counts.shape) or counts)
    assert calls == [torch.Size([20])] * 32


def test_only_the_weight_with_nan_has_no_threshold():
    sets = [[torch.tensor([1.0, 2.0])], [torch.tensor([1.0, math.nan])]]
    assert kth_by_bits(sets, [1, 1], torch.clone).isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match="got NaN or infinity in b, c; "):
        group_each({"a": sets[0][0], "b": sets[1][0], "c": sets[1][0]}, {"a": 1, "b": 1, "c": 0})


def test_thresholds_on_the_meta_device_have_no_values():
    (group,) = group_each({"w": torch.ones(3, device="meta")}, {"w": 2})
    assert (group.zeros, group.threshold.is_meta, group.threshold.shape) == (2, True, ())


def test_the_largest_threshold_is_nan_if_one_is():
    def largest(*thresholds):
        return Position(
            groups=[Group((str(i),), 1, torch.tensor(t)) for i, t in enumerate(thresholds)]
        ).largest_threshold

    assert largest(1.0, 3.0, 2.0) == 3.0
    assert largest(1.0, math.nan, 2.0).isnan()
    assert largest(math.nan).isnan()
    first = Group((), 0, torch.tensor(9.0))  # all its weights are at their guards
    assert Position(groups=[first, Group(("a",), 1, torch.tensor(1.0))]).largest_threshold == 1.0

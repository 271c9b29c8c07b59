"""The number of pruned elements of each weight; `test_kth` compares it with sorting."""

from __future__ import annotations

import pytest
import torch

from feather_param.ops.count import PruneCount, count_above, count_pruned


def test_all_zeros_are_counted_if_the_threshold_is_zero():
    weights = {"a": torch.zeros(3), "b": torch.tensor([0.0, 1.0])}
    assert count_pruned(weights, torch.tensor(0.0), 2) == {"a": PruneCount(3), "b": PruneCount(1)}


def test_ties_are_pruned_in_the_order_of_the_weights():
    weights = {"a": torch.tensor([2.0, 1.0]), "b": torch.tensor([-1.0, 1.0])}
    assert count_pruned(weights, torch.tensor(1.0), 2) == {"a": PruneCount(1), "b": PruneCount(1, ties=1)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0,), (3, 4, 5), (600, 500)])
def test_magnitudes_above_a_threshold_are_counted_in_the_precision_of_the_threshold(dtype, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    threshold = torch.tensor(0.3001, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    expected = sum(abs(value) > threshold.item() for value in weight.flatten().tolist())
    assert count_above(weight, threshold) == count_above(weight.mT if weight.dim() > 1 else weight, threshold)
    assert count_above(weight, threshold) == expected

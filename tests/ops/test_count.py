"""The number of pruned elements of each weight; `test_kth` compares it with sorting."""

from __future__ import annotations

import torch

from feather_param.ops.count import PruneCount, count_pruned


def test_all_zeros_are_counted_if_the_threshold_is_zero():
    weights = {"a": torch.zeros(3), "b": torch.tensor([0.0, 1.0])}
    assert count_pruned(weights, torch.tensor(0.0), 2) == {"a": PruneCount(3), "b": PruneCount(1)}


def test_ties_are_pruned_in_the_order_of_the_weights():
    weights = {"a": torch.tensor([2.0, 1.0]), "b": torch.tensor([-1.0, 1.0])}
    assert count_pruned(weights, torch.tensor(1.0), 2) == {"a": PruneCount(1), "b": PruneCount(1, ties=1)}

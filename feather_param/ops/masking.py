"""Weights with exact zeros, and masks that keep all elements."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from feather_param.ops.distributed import whole
from feather_param.ops.dtypes import smallest_kept


def with_exact_zeros(weight: Tensor, mask: Tensor) -> Tensor:
    """Return a weight with zeros where the mask is False, and only there.

    A kept element that is zero becomes a negligible non-zero number (`smallest_kept`), so that the number of zeros is
    exactly that of the mask.
    """
    return torch.where(mask, torch.where(weight == 0, smallest_kept(weight.dtype), weight), 0.0)


def all_kept(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return masks that keep every element. Before the pruning begins, elements that are zero are not pruned."""
    return {name: torch.ones_like(whole(weight), dtype=torch.bool) for name, weight in weights.items()}

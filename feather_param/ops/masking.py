"""Weights with exact zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from feather_param.ops.dtypes import smallest_kept


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """Return a weight with zeros where the mask is False, and only there.

    A kept element that is zero becomes the smallest number of its dtype: the number of zeros is then exactly that of
    the mask.
    """
    return torch.where(mask, torch.where(weight == 0, smallest_kept(weight.dtype), weight), 0.0)

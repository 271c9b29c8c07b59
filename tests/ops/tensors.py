"""Weights, thresholds and exponents for the tests of the operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

POWERS = [0.25, 0.5, 0.8, 1.0, 1.5, 2.0, 3.0, 4.0, 7.3, 50.0, math.inf]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def t(value: float) -> Tensor:
    """Return a threshold."""
    return torch.tensor(value)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a weight with normally distributed elements."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

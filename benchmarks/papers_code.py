"""The operator and the threshold of the paper's code, for comparison."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["RATE", "PapersOperator", "papers_threshold"]

RATE = 0.95


class PapersOperator(torch.autograd.Function):
    """The equation as written, for p = 3, with a float mask for the gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: Tensor | float, theta: float) -> Tensor:
        kept = weight.abs() > threshold
        cut = torch.sign(weight) * (weight.abs() ** 3 - threshold**3) ** (1 / 3)
        ctx.save_for_backward(torch.where(kept, 1.0, theta))
        return torch.where(kept, cut, torch.zeros_like(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (mask,) = ctx.saved_tensors
        return grads[0] * mask, None, None


def papers_threshold(weights: Iterable[Tensor], rate: float = RATE) -> float:
    """Return the threshold of a rate: concatenate, abs, sort, read.

    It is interpolated linearly between the two magnitudes around the position ``rate * (number - 1)``.
    """
    values = torch.cat([weight.detach().abs().flatten() for weight in weights]).sort().values
    position = rate * (values.numel() - 1)
    below = int(position)
    low, high = values[[below, min(below + 1, values.numel() - 1)]].tolist()
    return low + (high - low) * (position - below)

"""The operator and the threshold of the paper's code, and a model that trains with them, for comparison."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["RATE", "PapersOperator", "PapersSparsity", "papers_threshold"]

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


class PapersSparsity:
    """The paper's code on the weights of all convolutions and linear layers of a model.

    Args:
        model: the model. Its weights are reparametrized.
        theta: scale of the gradient of pruned weights.

    Attributes:
        weights: the dense weights.
        threshold: the threshold of all of them.
    """

    def __init__(self, model: nn.Module, theta: float = 1.0) -> None:
        layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        self.theta, self.threshold = theta, 0.0
        self.weights = [layer.weight for layer in layers]
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", _Papers(self))

    def update(self, rate: float = RATE) -> None:
        """Compute the threshold of a rate from the weights."""
        self.threshold = papers_threshold(self.weights, rate)

    def zeros(self) -> int:
        """Return the number of weights up to the threshold."""
        return sum(int((weight.abs() <= self.threshold).sum()) for weight in self.weights)


class _Papers(nn.Module):
    """The parametrization of one weight."""

    def __init__(self, sparsity: PapersSparsity) -> None:
        super().__init__()
        self.sparsity = sparsity

    def forward(self, weight: Tensor) -> Tensor:
        return PapersOperator.apply(weight, self.sparsity.threshold, self.sparsity.theta)

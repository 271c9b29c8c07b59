"""The Feather operator on units: each element is multiplied by a factor that the magnitude of its unit gives.

With one magnitude for each element, this is the operator of `operator`. It is computed with torch's operations. On a
CPU in eager code, numpy computes the root.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from feather_param.ops import operator_cpu
from feather_param.ops.operator import _factor, _gradient, _identity, _save, _scaled, wide_enough
from feather_param.ops.tracing import concrete, transformed


def shrink_units(
    weight: Tensor, magnitude: Tensor, threshold: Tensor, theta: float | Tensor = 1.0, p: float = 3.0
) -> Tensor:
    """Apply the Feather operator to a weight whose elements are pruned in units.

    ``P(w) = w * (1 - (t / m)^p)^(1/p)`` where ``m > t``, else 0.

    The gradient of the weight is straight-through: 1 where ``m > t``, ``theta`` elsewhere. Magnitudes and
    thresholds get no gradient.

    Args:
        weight: the weight, of any shape and floating dtype.
        magnitude: the magnitude m >= 0 of the unit of each element; float64 if the weight is, else float32. Its shape
            broadcasts to that of the weight.
        threshold: the threshold t >= 0, of the same dtype; 0-dim, or of a shape that broadcasts to that of `magnitude`.
        theta: scale of the gradient of the pruned elements, as in `feather_threshold`.
        p: exponent, as in `feather_threshold`.

    Returns:
        A tensor of the shape and dtype of ``weight``.

    Source: Feather (https://arxiv.org/abs/2310.02448), with the magnitude of a unit in the place of that of an element.

    Example:
        >>> w = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> shrink_units(w, torch.tensor([[5.0], [0.5]]), torch.tensor(1.0), p=2)
        tensor([[2.9394, 3.9192],
                [0.0000, 0.0000]])
    """
    theta = theta if isinstance(theta, Tensor) else float(theta)
    if torch.compiler.is_compiling() or transformed():
        return _TransformableUnits.apply(weight, magnitude, threshold, theta, float(p))[0]
    return _Units.apply(weight, magnitude, threshold, theta, float(p))


class _Units(torch.autograd.Function):
    """`shrink_units` in eager code; see Note [Two functions] in `operator`."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, magnitude: Tensor, threshold: Tensor, theta: float | Tensor, p: float
    ) -> Tensor:
        out, pruned = _shrink(weight, magnitude, threshold, p)
        _save(ctx, pruned, theta)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None, None]:
        return _gradient(ctx, grads[0], _scaled), None, None, None, None


class _TransformableUnits(torch.autograd.Function):
    """`shrink_units` in function transforms and compiled graphs; see Note [Two functions] in `operator`."""

    @staticmethod
    def forward(
        weight: Tensor, magnitude: Tensor, threshold: Tensor, theta: float | Tensor, p: float
    ) -> tuple[Tensor, Tensor]:
        out, pruned = _shrink(weight, magnitude, threshold, p)
        return out, weight.new_empty(0, dtype=torch.bool) if _identity(theta) else pruned

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        _save(ctx, output[1], inputs[3])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], Any]:
        *tensors, theta, p = inputs
        batches = [
            [tensor] * info.batch_size if dim is None else tensor.unbind(dim)
            for tensor, dim in zip(tensors, in_dims[:3], strict=True)
        ]
        results = (_TransformableUnits.apply(*each, theta, p) for each in zip(*batches, strict=True))
        outs, masks = zip(*results, strict=True)
        return (torch.stack(outs), torch.stack(masks)), (0, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None, None]:
        return _gradient(ctx, grads[0], _scaled), None, None, None, None


def _shrink(weight: Tensor, magnitude: Tensor, threshold: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return P(weight) in the weight's dtype, and the mask of the pruned units in the shape of the magnitudes."""
    pruned = magnitude <= threshold  # False for a NaN, which must stay visible
    if p == math.inf:
        factor = (~pruned).to(magnitude.dtype)
    else:
        m = wide_enough(magnitude, p)
        factor = torch.where(pruned, 0.0, (_factor_on_cpu if _on_cpu(m) else _factor)(m, threshold, p))
    wide = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    out = torch.where(pruned, 0.0, wide * factor)
    return out if out.dtype == weight.dtype else out.to(weight.dtype), pruned  # not always `.to`: see `operator`


def _on_cpu(magnitude: Tensor) -> bool:
    return magnitude.device.type == "cpu" and concrete(magnitude)


def _factor_on_cpu(magnitude: Tensor, threshold: Tensor, p: float) -> Tensor:
    """Return the factor of `operator_cpu`, which has a faster cube root than torch."""
    with operator_cpu.np.errstate(all="ignore"):
        return torch.from_numpy(operator_cpu._factor(magnitude.numpy(), threshold.numpy(), p))

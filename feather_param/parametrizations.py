"""The Feather operator, and the parametrization that applies it to one weight.

This module knows nothing of models, layers or time: a parametrization reads the threshold of its group
(`SharedThreshold`), and somebody else (`controller.py`) decides what that threshold is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FeatherParametrization", "SharedThreshold", "feather_threshold"]

# Elements the operator handles at a time on a CPU: its half a dozen intermediates then stay in the cache
# instead of each being a fresh allocation as large as the weight (measured by `benchmarks.operator`).
_CHUNK = 1 << 17


def feather_threshold(weight: Tensor, threshold: Tensor, theta: float = 1.0, p: float = 3.0) -> Tensor:
    r"""Apply the Feather thresholding operator to a weight.

    .. math::
        P(w) = \operatorname{sign}(w) \, (|w|^p - t^p)^{1/p} \text{ where } |w| > t, \text{ else } 0

    The gradient is straight-through: 1 where :math:`|w| > t`, ``theta`` elsewhere; ``threshold`` gets none.
    ``p = 1`` is soft thresholding, ``p = math.inf`` hard thresholding; a zero threshold is the identity.
    It is computed as :math:`w (1 - (1 - u)^p)^{1/p}` with :math:`u = (|w| - t) / |w|`, in float32 at
    least: :math:`|w| - t` is exact near the threshold, where the equation as written cancels.

    Args:
        weight: the weight, of any shape and floating dtype.
        threshold: the threshold t >= 0, a 0-dim float32 tensor.
        theta: scale of the gradient of the pruned weights.
        p: exponent, a number >= 1 or ``math.inf``.

    Returns:
        A tensor of the shape, dtype and memory format of ``weight``.

    Source: Feather (BMVC 2023), the thresholding operator and its scaled straight-through gradient.

    Example:
        >>> feather_threshold(torch.tensor([-2.0, 0.5, 1.0]), torch.tensor(1.0), p=3)
        tensor([-1.9129,  0.0000,  0.0000])
    """
    return _FeatherThreshold.apply(weight, threshold, float(theta), float(p))[0]


def _shrink(weight: Tensor, threshold: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return P(weight), in float32 at least, and the mask of what it set to zero."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    magnitude = weight.abs()
    pruned = magnitude <= threshold  # a NaN is not pruned: it must stay visible
    if p == math.inf:
        return torch.where(pruned, 0.0, weight), pruned
    u = (magnitude - threshold).div_(magnitude)
    return torch.where(pruned, 0.0, _factor(u, p).mul_(weight)), pruned


def _factor(u: Tensor, p: float) -> Tensor:
    """Return (1 - (1 - u)^p)^(1/p) for u in (0, 1]; whatever else is in `u` gives garbage."""
    if p == 1.0:
        return u
    if p == 2.0:
        return torch.sub(2.0, u).mul_(u).sqrt_()
    if p == 3.0:
        return torch.sub(u, 3.0).mul_(u).add_(3.0).mul_(u).pow_(1.0 / 3.0)
    return u.neg_().log1p_().mul_(p).expm1_().neg_().pow_(1.0 / p)


def _flat(tensor: Tensor) -> Tensor:
    """Return a 1-D view of a dense tensor in the order of its memory."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).view(-1)


def _shrink_in_chunks(weight: Tensor, threshold: Tensor, p: float, with_mask: bool) -> tuple[Tensor, Tensor | None]:
    out = torch.empty_like(weight)
    if out.stride() != weight.stride():  # overlapping or with gaps: `empty_like` chose other strides
        weight = out.copy_(weight)
    pruned = torch.empty_like(weight, dtype=torch.bool) if with_mask else None
    masks = _flat(pruned).split(_CHUNK) if pruned is not None else None
    for i, (target, source) in enumerate(zip(_flat(out).split(_CHUNK), _flat(weight).split(_CHUNK), strict=True)):
        values, mask = _shrink(source, threshold, p)
        target.copy_(values)
        if masks is not None:
            masks[i].copy_(mask)
    return out, pruned


class _FeatherThreshold(torch.autograd.Function):
    """`feather_threshold` with its own gradient.

    With theta = 1 the gradient is the identity and nothing is saved; otherwise one byte per weight is.
    The mask is an output because `setup_context`, which torch.func needs, sees only inputs and outputs.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, threshold: Tensor, theta: float, p: float) -> tuple[Tensor, Tensor | None]:
        if weight.device.type == "cpu" and weight.numel() > _CHUNK and not torch.compiler.is_compiling():
            return _shrink_in_chunks(weight, threshold, p, with_mask=theta != 1.0)
        out, pruned = _shrink(weight, threshold, p)
        return out.to(weight.dtype), pruned if theta != 1.0 else None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        ctx.theta = inputs[2]
        pruned = output[1]
        if pruned is not None:
            ctx.mark_non_differentiable(pruned)
            ctx.save_for_backward(pruned)
            ctx.save_for_forward(pruned)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        return _scale(ctx, grads[0]), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        # A view, because an output tangent may not be the input tangent itself.
        return _scale(ctx, tangents[0]).view_as(tangents[0]), None


def _scale(ctx: Any, slope: Tensor) -> Tensor:
    if ctx.theta == 1.0:
        return slope
    (pruned,) = ctx.saved_tensors
    return torch.where(pruned, slope * ctx.theta, slope)


class SharedThreshold(nn.Module):
    """The threshold of a group of weights, and how many of them it prunes.

    Buffers: ``threshold`` (0-dim float32) and ``pruned`` (0-dim int64, the exact number of zeros aimed at).
    They follow the model's device but never its dtype, and travel in its ``state_dict``, so that the
    ``state_dict`` alone is enough to evaluate the model and to bake it.

    Args:
        total: number of weights in the group.
        device: where the buffers live at first.
    """

    threshold: Tensor
    pruned: Tensor

    def __init__(self, total: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.total = total
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("pruned", torch.zeros((), dtype=torch.int64, device=device))

    def set(self, threshold: Tensor, pruned: int) -> None:
        """Take over a new threshold in place, so that every reader and compiled graph sees it."""
        with torch.no_grad():
            self.threshold.copy_(threshold)
            self.pruned.fill_(pruned)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedThreshold:
        before = self.threshold
        super()._apply(fn, recurse)
        if self.threshold.dtype != torch.float32:  # .half(), .double(), .to(bfloat16): a rounded t is another t
            self.threshold = before.to(self.threshold.device)
        return self


# Note [One threshold, many readers]
# The `SharedThreshold` is a submodule of exactly one parametrization (the "owner", the first weight of the
# group) and a plain attribute of the others. One registration means one entry in the state_dict (two would be
# shared memory, which safetensors refuses), one visit by `.to()` and one copy by `deepcopy`; and the
# plain references in a deepcopy lead to the copy's own threshold, so that an EMA copy stands alone.


class FeatherParametrization(nn.Module):
    """Reparametrize a weight by the Feather operator with the threshold of its group.

    Made by :func:`feather_param.sparsify`; for use with :mod:`torch.nn.utils.parametrize`.

    Args:
        shared: the threshold that this weight's group shares.
        owner: whether ``shared`` is registered here; true for exactly one weight of the group
            (see Note [One threshold, many readers]).
        p: exponent of the operator.
        theta: scale of the gradient of the pruned weights.
        parameter_order: names of the layer's parameters before any parametrization, to restore their order.

    Shape:
        ``forward`` maps a weight of any shape to one of the same shape and dtype.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.weight = nn.Parameter(torch.tensor([[-2.0, 0.5]]))
        >>> shared = SharedThreshold(total=2)
        >>> _ = nn.utils.parametrize.register_parametrization(layer, "weight", FeatherParametrization(shared))
        >>> shared.set(torch.tensor(1.0), pruned=1)
        >>> layer.weight
        tensor([[-1.9129,  0.0000]], grad_fn=<_FeatherThresholdBackward>)
    """

    shared: SharedThreshold

    def __init__(
        self,
        shared: SharedThreshold,
        *,
        owner: bool = True,
        p: float = 3.0,
        theta: float = 1.0,
        parameter_order: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        if owner:
            self.shared = shared
        else:
            object.__setattr__(self, "shared", shared)
        self.p = p
        self.theta = theta
        self.parameter_order = parameter_order

    def forward(self, weight: Tensor) -> Tensor:
        threshold = self.shared.threshold.to(weight.device)
        return feather_threshold(weight, threshold, self.theta, self.p)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Make ``layer.weight = w`` store ``w`` as the dense weight."""
        return weight

    def extra_repr(self) -> str:
        return f"p={self.p}, theta={self.theta}"

"""The Feather operator, with its own gradient: a function of one weight and one threshold."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from feather_param.thresholds import flat, kernels

__all__ = ["feather_threshold", "smallest_kept"]

# Elements the operator handles at a time on a CPU, so that what it makes of them stays in the cache (measured by
# `benchmarks.operator`): where few weights survive, and where it computes with all of them.
_CHUNK = 1 << 19
_DENSE_CHUNK = 1 << 17
# With fewer elements than this, looking for the survivors takes longer than computing them all.
_SMALL = 1 << 15


def feather_threshold(weight: Tensor, threshold: Tensor, theta: float | Tensor = 1.0, p: float = 3.0) -> Tensor:
    r"""Apply the Feather thresholding operator to a weight.

    .. math::
        P(w) = \operatorname{sign}(w) \, (|w|^p - t^p)^{1/p} \text{ where } |w| > t, \text{ else } 0

    The gradient is straight-through: 1 where :math:`|w| > t`, ``theta`` elsewhere; ``threshold`` gets none.
    Magnitudes are compared as float32, whatever the weight's dtype.
    ``p = 1`` is soft thresholding, ``p = math.inf`` hard thresholding; a zero threshold is the identity.
    It is computed as :math:`w (1 - (1 - u)^p)^{1/p}` with :math:`u = (|w| - t) / |w|`, in float32 at
    least: :math:`|w| - t` is exact near the threshold, where the equation as written cancels.

    Args:
        weight: the weight, of any shape and floating dtype.
        threshold: the threshold t >= 0, a 0-dim float32 tensor.
        theta: scale of the gradient of the pruned weights; a 0-dim tensor may change between steps without a
            recompilation.
        p: exponent, a number >= 1 or ``math.inf``.

    Returns:
        A tensor of the shape, dtype and memory format of ``weight``.

    Source: Feather (https://arxiv.org/abs/2310.02448), the family of thresholding operators and the scaled
    straight-through gradient.

    Example:
        >>> feather_threshold(torch.tensor([-2.0, 0.5, 1.0]), torch.tensor(1.0), p=3)
        tensor([-1.9129,  0.0000,  0.0000])
    """
    return _FeatherThreshold.apply(weight, threshold, theta if isinstance(theta, Tensor) else float(theta), float(p))[0]


def _shrink(weight: Tensor, threshold: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return P(weight), in float32 at least, and the mask of what it set to zero."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    magnitude = weight.abs()
    pruned = magnitude.float() <= threshold  # a NaN is not pruned: it must stay visible
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


# Note [Sparse where it is sparse]
# The root in P(w) takes most of the time, and at a rate of 95 % nineteen of twenty are taken in vain. So a large
# weight on a CPU is cut with `hardshrink` (0 where |w| <= t), and only what survives is gathered, computed and put
# back. Below a rate of about 70 % gathering costs more than it saves, and everything is computed; a sample of the
# weight decides, which concerns speed alone. The shapes depend on the values, so compiled graphs and other devices,
# where that would mean waiting, always compute everything.


def _shrink_on_cpu(weight: Tensor, threshold: Tensor, p: float, with_mask: bool) -> tuple[Tensor, Tensor | None]:
    """Return what `_shrink` does, in the weight's dtype; see Note [Sparse where it is sparse]."""
    weight, out, pruned = _results(weight, with_mask)
    source, target = flat(weight), flat(out)
    sample = source[:: source.numel() // 1024]
    few = weight.dtype != torch.float64 and float((sample.abs() > threshold).float().mean()) < 0.3
    chunk = _CHUNK if few else _DENSE_CHUNK
    masks = flat(pruned).split(chunk) if pruned is not None else None
    for i, (old, new) in enumerate(zip(source.split(chunk), target.split(chunk), strict=True)):
        if few:
            values = _shrink_survivors(old, threshold, p, new)
            mask = values == 0 if masks is not None else None
        else:
            values, mask = _shrink(old, threshold, p)
        if values is not new:
            new.copy_(values)
        if masks is not None:
            masks[i].copy_(mask)  # type: ignore[arg-type]
    return out, pruned


def _shrink_on_gpu(
    weight: Tensor, threshold: Tensor, p: float, with_mask: bool, gpu: ModuleType
) -> tuple[Tensor, Tensor | None]:
    """Return what `_shrink` does, in the weight's dtype, by one kernel."""
    weight, out, pruned = _results(weight, with_mask)
    threshold = threshold.to(weight.device, torch.float32)  # a number on the CPU would do elsewhere, but not here
    gpu.shrink(flat(weight), threshold, p, flat(out), None if pruned is None else flat(pruned))
    return out, pruned


def _results(weight: Tensor, with_mask: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the weight and room for its result and its mask, all with the same strides."""
    out = torch.empty_like(weight)
    if out.stride() != weight.stride():  # overlapping or with gaps: `empty_like` chose other strides
        weight = out.copy_(weight)
    return weight, out, torch.empty_like(weight, dtype=torch.bool) if with_mask else None


def _shrink_survivors(weight: Tensor, threshold: Tensor, p: float, out: Tensor) -> Tensor:
    """Return P(weight) of a 1-D weight, in float32 at least, computing only what is not cut; in `out` if it can."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    values = torch.hardshrink(wide, float(threshold), out=out if out.dtype == wide.dtype else None)
    if p == math.inf:
        return values
    index = torch.from_numpy(np.flatnonzero(values.numpy() != 0))  # several times as fast as torch's nonzero
    kept = values.index_select(0, index)
    magnitude = kept.abs()
    return values.index_copy_(0, index, _factor((magnitude - threshold).div_(magnitude), p).mul_(kept))


def smallest_kept(dtype: torch.dtype) -> float:
    """Return the smallest magnitude that survives arithmetic in a dtype.

    Subnormals are flushed to zero on some devices, except in float16, whose smallest normal number, 6e-5, is
    too large to stand for nothing.
    """
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps if dtype == torch.float16 else info.smallest_normal


def _identity(theta: float | Tensor) -> bool:
    """Return whether the gradient is that of the output, pruned weights included."""
    return not isinstance(theta, Tensor) and theta == 1.0


class _FeatherThreshold(torch.autograd.Function):
    """`feather_threshold` with its own gradient.

    With a constant theta of 1 the gradient is the identity and nothing is saved; otherwise one byte per weight is.
    The mask is an output because `setup_context`, which torch.func needs, sees only inputs and outputs; it is empty
    where it is not needed, for older torch.compile knows no output that is None. There is no `jvp` (forward-mode
    derivatives), because torch.compile refuses a Function that has one.
    """

    @staticmethod
    def forward(weight: Tensor, threshold: Tensor, theta: float | Tensor, p: float) -> tuple[Tensor, Tensor]:
        plain = type(weight) in (Tensor, nn.Parameter)  # not what only stands for a tensor
        large = weight.device.type == "cpu" and weight.numel() > _SMALL
        pruned: Tensor | None
        with_mask = not _identity(theta)
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        if traced or not plain:
            out, pruned = _shrink(weight, threshold, p)
        elif large:
            out, pruned = _shrink_on_cpu(weight, threshold, p, with_mask)
        elif weight.device.type == "cuda" and (gpu := kernels(weight.device)) and gpu.serves(weight, p):
            out, pruned = _shrink_on_gpu(weight, threshold, p, with_mask, gpu)
        else:
            out, pruned = _shrink(weight, threshold, p)
        if pruned is None or not with_mask:
            pruned = weight.new_empty(0, dtype=torch.bool)
        return out.to(weight.dtype), pruned

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        theta = inputs[2]
        ctx.mark_non_differentiable(output[1])
        ctx.identity = _identity(theta)
        ctx.theta = None if isinstance(theta, Tensor) else theta
        if not ctx.identity:
            ctx.save_for_backward(output[1], *([theta] if ctx.theta is None else []))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], Any]:
        weight, threshold, theta, p = inputs
        if in_dims[1] is None:  # the operator works element by element: a batch is just a larger weight
            return _FeatherThreshold.apply(weight, threshold, theta, p), (
                in_dims[0],
                None if _identity(theta) else in_dims[0],
            )
        weights = [weight] * info.batch_size if in_dims[0] is None else weight.unbind(in_dims[0])
        pairs = zip(weights, threshold.unbind(in_dims[1]), strict=True)
        outs, masks = zip(*(_FeatherThreshold.apply(*pair, theta, p) for pair in pairs), strict=True)
        return (torch.stack(outs), torch.stack(masks)), (0, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        slope = grads[0]
        if not ctx.identity:
            pruned, *varying = ctx.saved_tensors
            theta = varying[0].to(slope.dtype) if varying else ctx.theta
            slope = torch.where(pruned, slope * theta, slope)
        return slope, None, None, None

"""The Feather operator, with its own gradient: a function of one weight and one threshold."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from feather_param.ops import operator_cpu
from feather_param.ops.dtypes import flat
from feather_param.ops.tracing import concrete, transformed
from feather_param.ops.triton import kernels

# With fewer elements than this, the gradient is not worth cutting into parts (`benchmarks.operator`).
_SMALL = 1 << 18


def feather_threshold(weight: Tensor, threshold: Tensor, theta: float | Tensor = 1.0, p: float = 3.0) -> Tensor:
    r"""Apply the Feather thresholding operator to a weight.

    .. math::
        P(w) = \operatorname{sign}(w) \, (|w|^p - t^p)^{1/p} \text{ where } |w| > t, \text{ else } 0

    The gradient is straight-through: 1 where :math:`|w| > t`, ``theta`` elsewhere; ``threshold`` gets none.
    Magnitudes are compared in float32, those of a float64 weight in float64.
    ``p = 1`` is soft thresholding, ``p = math.inf`` hard thresholding; a zero threshold is the identity.
    It is computed as :math:`w (1 - (1 - u)^p)^{1/p}` with :math:`u = (|w| - t) / |w|`, in float32 at
    least: :math:`|w| - t` is exact near the threshold, where the equation as written cancels.

    Args:
        weight: the weight, of any shape and floating dtype.
        threshold: the threshold t >= 0, a 0-dim tensor; float32, or float64 where the weight is.
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
    theta = theta if isinstance(theta, Tensor) else float(theta)
    if torch.compiler.is_compiling() or transformed():
        return _TransformableThreshold.apply(weight, threshold, theta, float(p))[0]
    return _FeatherThreshold.apply(weight, threshold, theta, float(p))


def _shrink(weight: Tensor, threshold: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return P(weight), in float32 at least, and the mask of what it set to zero."""
    if weight.dtype in (torch.float16, torch.bfloat16):
        weight = weight.float()
    magnitude = weight.abs()
    pruned = magnitude <= threshold  # a NaN is not pruned: it must stay visible
    if p == math.inf:
        return torch.where(pruned, 0.0, weight), pruned
    u = (magnitude - threshold).div_(magnitude)
    return torch.where(pruned, 0.0, _factor(u, p).mul_(weight)), pruned


def _knows_bits() -> bool:
    """Return whether what is traced may look at a number's bits: not for ONNX, and not under vmap of torch 2.11."""
    exporting = getattr(torch.compiler, "is_exporting", lambda: True)  # torch 2.6 does not tell
    return not (exporting() or transformed())


# What `torch.compiler.assume_constant_result` sets, which would import the compiler: called where a graph is traced,
# instead of becoming a part of it.
_knows_bits._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _factor(u: Tensor, p: float) -> Tensor:
    """Return (1 - (1 - u)^p)^(1/p) for u in (0, 1]; whatever else is in `u` gives garbage."""
    if p == 1.0:
        return u
    if p == 2.0:
        return torch.sub(2.0, u).mul_(u).sqrt_()
    if p == 3.0:
        cube = torch.sub(u, 3.0).mul_(u).add_(3.0).mul_(u)
        fused = torch.compiler.is_dynamo_compiling() and cube.dtype == torch.float32 and _knows_bits()
        return _cube_root(cube) if fused else cube.pow_(1.0 / 3.0)
    return u.neg_().log1p_().mul_(p).expm1_().neg_().pow_(1.0 / p)


# The bits of 1.0 in float32: exponent and mantissa, read as an integer, are almost the logarithm of a number.
_ONE = 0x3F800000


def _cube_root(x: Tensor) -> Tensor:
    """Return the cube root of x in (0, 1], float32, to 2 ulp, and 1 of 1; whatever else is in `x` gives garbage.

    Fused by a compiler for a CPU, the operator takes a third of the time that it takes with a power (`benchmarks`);
    eagerly it would take longer. A third of the logarithm gives z, within 9 % of the inverse of the root; then the
    series of (1 - h)^(-1/3) with h = 1 - x z^3 corrects z, and that of (1 - r)^(-2/3) corrects x z^2.
    """
    logarithm = x.view(torch.int32) - _ONE
    z = (_ONE - (logarithm.float() * (1 / 3)).to(torch.int32)).view(torch.float32)
    h = 1.0 - x * z * z * z
    z = z + z * h * (1 / 3 + h * (2 / 9 + h * (14 / 81)))
    y = x * (z * z)
    r = 1.0 - y * z
    return y + y * (r * (2 / 3 + r * (5 / 9)))


def _shrink_on_cpu(weight: Tensor, threshold: Tensor, p: float, with_mask: bool) -> tuple[Tensor, Tensor | None]:
    """Return what `_shrink` does, in the weight's dtype, computing only what survives."""
    weight, out, pruned = _results(weight, with_mask)
    operator_cpu.shrink(weight, threshold, p, out, pruned)
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


def _compute(weight: Tensor, threshold: Tensor, p: float, with_mask: bool) -> tuple[Tensor, Tensor | None]:
    """Return what `_shrink` does, in the weight's dtype, by the fastest way there is."""
    if concrete(weight):
        if weight.device.type == "cpu" and operator_cpu.serves(weight):
            return _shrink_on_cpu(weight, threshold, p, with_mask)
        if weight.device.type == "cuda" and (found := kernels(weight.device)) and found.operator.serves(weight, p):
            return _shrink_on_gpu(weight, threshold, p, with_mask, found.operator)
    out, pruned = _shrink(weight, threshold, p)
    # A conversion that does nothing gives the same tensor again, which torch.compile of torch 2.11 takes for another
    # result of the forward pass; the gradient then goes there, and the weight gets zeros.
    return out if out.dtype == weight.dtype else out.to(weight.dtype), pruned


def _identity(theta: float | Tensor) -> bool:
    """Return whether the gradient is that of the output, pruned weights included."""
    return not isinstance(theta, Tensor) and theta == 1.0


def _gradient(ctx: Any, grad: Tensor, scaled: Callable[[Tensor, Tensor, float | Tensor], Tensor]) -> Tensor:
    """Return the gradient of the weight, given that of the result; a theta that varies was saved with the mask."""
    if _identity(ctx.theta):
        return grad
    pruned, *varying = ctx.saved_tensors
    return scaled(grad, pruned, varying[0].to(grad.dtype) if varying else ctx.theta)


def _scaled(grad: Tensor, pruned: Tensor, theta: float | Tensor) -> Tensor:
    """Return the gradient with that of the pruned weights scaled."""
    return torch.where(pruned, grad * theta, grad)


def _scaled_in_parts(grad: Tensor, pruned: Tensor, theta: float | Tensor) -> Tensor:
    """Return what `_scaled` does; of a large one on a CPU part by part, so that what comes between stays in the cache.

    Not of one that is differentiated or transformed itself.
    """
    large = grad.device.type == "cpu" and grad.numel() > _SMALL and grad.stride() == pruned.stride()
    if not large or torch.is_grad_enabled() or not concrete(grad):
        return _scaled(grad, pruned, theta)
    out = torch.empty_like(grad)
    for part, mask, new in zip(*(flat(tensor).split(_SMALL) for tensor in (grad, pruned, out)), strict=True):
        torch.mul(part, theta, out=new)
        torch.where(mask, new, part, out=new)
    return out


# Note [Two functions]
# What `torch.func` transforms and `torch.compile` traces must have a `setup_context`, which sees only inputs and
# outputs. Called eagerly such a Function takes a hundred microseconds longer in the middle of a training step, when the
# caches are full of activations: more than the operator itself on a small layer. So there is another one for that.
# With a constant theta of 1 the gradient is the identity and nothing is saved; otherwise one byte per weight is.
# There is no `jvp` (forward-mode derivatives), because torch.compile refuses a Function that has one.


class _FeatherThreshold(torch.autograd.Function):
    """`feather_threshold` with its own gradient, eagerly; see Note [Two functions]."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: Tensor, theta: float | Tensor, p: float) -> Tensor:
        out, pruned = _compute(weight, threshold, p, not _identity(theta))
        varying = isinstance(theta, Tensor)
        ctx.theta = None if varying else theta
        if not _identity(theta):
            ctx.save_for_backward(pruned, *([theta] if varying else []))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        return _gradient(ctx, grads[0], _scaled_in_parts), None, None, None


class _TransformableThreshold(torch.autograd.Function):
    """The same for function transforms and compiled graphs; see Note [Two functions].

    The mask is an output, empty where it is not needed, for older torch.compile knows no output that is None.
    """

    @staticmethod
    def forward(weight: Tensor, threshold: Tensor, theta: float | Tensor, p: float) -> tuple[Tensor, Tensor]:
        out, pruned = _compute(weight, threshold, p, not _identity(theta))
        return out, weight.new_empty(0, dtype=torch.bool) if pruned is None or _identity(theta) else pruned

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        theta = inputs[2]
        varying = isinstance(theta, Tensor)
        ctx.mark_non_differentiable(output[1])
        ctx.theta = None if varying else theta
        if not _identity(theta):
            ctx.save_for_backward(output[1], *([theta] if varying else []))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], Any]:
        weight, threshold, theta, p = inputs
        if in_dims[1] is None:  # the operator works element by element: a batch is just a larger weight
            return _TransformableThreshold.apply(weight, threshold, theta, p), (
                in_dims[0],
                None if _identity(theta) else in_dims[0],
            )
        weights = [weight] * info.batch_size if in_dims[0] is None else weight.unbind(in_dims[0])
        pairs = zip(weights, threshold.unbind(in_dims[1]), strict=True)
        outs, masks = zip(*(_TransformableThreshold.apply(*pair, theta, p) for pair in pairs), strict=True)
        return (torch.stack(outs), torch.stack(masks)), (0, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        return _gradient(ctx, grads[0], _scaled), None, None, None

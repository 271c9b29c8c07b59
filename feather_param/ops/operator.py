"""The Feather operator: a function of one weight and one threshold, with its own gradient.

This module chooses the fastest computation for the device, computes with torch's operations where no faster one
applies, and defines the gradient. `operator_cpu` and `operator_triton` have the fast computations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from feather_param.ops import operator_cpu
from feather_param.ops.dtypes import flat
from feather_param.ops.gpu_kernels import kernels
from feather_param.ops.tracing import concrete, transformed

# Note [Factor]
# Where |w| > t, the operator multiplies w by a factor:
#     sign(w) (|w|^p - t^p)^(1/p) = w (1 - q^p)^(1/p)   with q = t / |w| = 1 - u and u = (|w| - t) / |w|
# The equation on the left cancels near the threshold. u does not: for t <= |w| <= 2 t the difference |w| - t is exact
# in floating-point arithmetic. u lies in (0, 1], and for a few exponents the factor is simple:
#     p = 1/2       (u / (1 + q^(1/2)))^2
#     p = 1         u
#     p = 2         ((2 - u) u)^(1/2)
#     p = 3         (u (3 - u (3 - u)))^(1/3)
#     p = infinity  1
#     other p       (-expm1(p log(q)))^(1/p)   with log(q) = log1p(-u) for u < 1/2
# A factor of exactly 1 for u = 1 makes a zero threshold the identity. The last line is computed in float64, because the
# power 1/p multiplies the relative error of its argument by 1/p. So a float64 weight has an error of about 10 / p ulp
# there. For a small p the factor may underflow to 0 near the threshold, where it is about (p u)^(1/p).
# It is computed in `_factor` (torch), in `operator_cpu` (numpy) and in `operator_triton` (Triton).


def feather_threshold(weight: Tensor, threshold: Tensor, theta: float | Tensor = 1.0, p: float = 3.0) -> Tensor:
    """Apply the Feather thresholding operator to a weight.

    ``P(w) = sign(w) * (|w|^p - t^p)^(1/p)`` where ``|w| > t``, else 0.

    ``p = 1`` is soft thresholding, ``p = math.inf`` hard thresholding. The smaller ``p`` is, the more an element near
    the threshold shrinks. A zero threshold is the identity.
    Magnitudes are compared in float32, those of a float64 weight in float64. Arithmetic has at least this precision.

    The gradient of the weight is straight-through: 1 where ``|w| > t``, ``theta`` elsewhere. ``threshold`` gets no
    gradient.

    Args:
        weight: the weight, of any shape and floating dtype.
        threshold: the threshold t >= 0, a 0-dim tensor; float32, or float64 if the weight is.
        theta: scale of the gradient of the pruned elements. A 0-dim tensor may change between steps without a
            recompilation.
        p: exponent, a number > 0 or ``math.inf``.

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


# Note [Two functions]
# `torch.func` transforms and `torch.compile` need a Function with `setup_context`, which sees only inputs and outputs.
# Called eagerly in the middle of a training step, when the caches are full of activations, such a Function takes a
# hundred microseconds longer. That is more than the operator itself takes on a small layer. So there is a second
# Function for eager code.
# With a constant theta of 1 the gradient is the identity, and nothing is saved for the backward pass. Otherwise the
# mask is saved, one byte an element.
# There is no `jvp` (forward-mode derivatives), because torch.compile refuses a Function that has one.


class _FeatherThreshold(torch.autograd.Function):
    """`feather_threshold` in eager code; see Note [Two functions]."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: Tensor, theta: float | Tensor, p: float) -> Tensor:
        out, pruned = _compute(weight, threshold, p, not _identity(theta))
        _save(ctx, pruned, theta)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        return _gradient(ctx, grads[0], _scaled_in_chunks), None, None, None


class _TransformableThreshold(torch.autograd.Function):
    """`feather_threshold` in function transforms and compiled graphs; see Note [Two functions].

    The mask of the pruned elements is a second output. It is empty if it is not needed, because older versions of
    torch.compile support no output that is None.
    """

    @staticmethod
    def forward(weight: Tensor, threshold: Tensor, theta: float | Tensor, p: float) -> tuple[Tensor, Tensor]:
        out, pruned = _compute(weight, threshold, p, not _identity(theta))
        return out, weight.new_empty(0, dtype=torch.bool) if pruned is None or _identity(theta) else pruned

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        _save(ctx, output[1], inputs[2])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], Any]:
        weight, threshold, theta, p = inputs
        if in_dims[1] is None:  # one threshold: the operator works element by element, so a batch is a larger weight
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


# -- forward ----------------------------------------------------------------------------------------------------------


def _compute(weight: Tensor, threshold: Tensor, p: float, with_mask: bool) -> tuple[Tensor, Tensor | None]:
    """Return P(weight) in the weight's dtype and the mask of the pruned elements, by the fastest method available.

    Without `with_mask`, the mask may be None.
    """
    if concrete(weight):
        if weight.device.type == "cpu" and operator_cpu.supports(weight):
            return _shrink_on_cpu(weight, threshold, p, with_mask)
        if weight.device.type == "cuda" and (found := kernels(weight.device)) and found.operator.supports(weight):
            return _shrink_on_gpu(weight, threshold, p, with_mask, found.operator)
    out, pruned = _shrink(weight, threshold, p)
    # `.to` with the same dtype returns the same tensor. torch.compile of torch 2.11 treats it as another output, and
    # the weight gets a zero gradient.
    return out if out.dtype == weight.dtype else out.to(weight.dtype), pruned


def _shrink_on_cpu(weight: Tensor, threshold: Tensor, p: float, with_mask: bool) -> tuple[Tensor, Tensor | None]:
    """Compute the operator with `operator_cpu`."""
    weight, out, pruned = _results(weight, with_mask)
    operator_cpu.shrink(weight, threshold, p, out, pruned)
    return out, pruned


def _shrink_on_gpu(
    weight: Tensor, threshold: Tensor, p: float, with_mask: bool, gpu: ModuleType
) -> tuple[Tensor, Tensor | None]:
    """Compute the operator with the kernel of a module, `operator_triton`."""
    weight, out, pruned = _results(weight, with_mask)
    threshold = threshold.to(weight.device, torch.float32)  # torch's operations accept one on the CPU, kernels do not
    gpu.shrink(flat(weight), threshold, p, flat(out), None if pruned is None else flat(pruned))
    return out, pruned


def _results(weight: Tensor, with_mask: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the weight, an empty tensor for the result, and one for the mask or None; all with the same strides."""
    out = torch.empty_like(weight)
    if out.stride() != weight.stride():  # elements overlap or have gaps: `empty_like` chose other strides
        weight = out.copy_(weight)
    return weight, out, torch.empty_like(weight, dtype=torch.bool) if with_mask else None


def _shrink(weight: Tensor, threshold: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return P(weight), in float32 or float64, and the mask of the pruned elements, with torch's operations."""
    if weight.dtype in (torch.float16, torch.bfloat16):
        weight = weight.float()
    magnitude = weight.abs()
    pruned = magnitude <= threshold  # False for a NaN, which must stay visible
    if p == math.inf:
        return torch.where(pruned, 0.0, weight), pruned
    factor = _factor(wide_enough(magnitude, p), threshold, p)
    return torch.where(pruned, 0.0, factor.mul_(weight)), pruned


def wide_enough(magnitude: Tensor, p: float) -> Tensor:
    """Return magnitudes in the precision that `_factor` needs: float64 for most exponents, see Note [Factor]."""
    without = magnitude.device.type == "mps"  # it has no float64
    return magnitude if p in operator_cpu.SIMPLE or without else magnitude.double()


def _factor(magnitude: Tensor, threshold: Tensor, p: float) -> Tensor:
    """Return P(w) / w, see Note [Factor]; elements of at most the threshold give undefined values."""
    u = (magnitude - threshold).div_(magnitude)
    if p == 0.5:
        return u.div_((threshold / magnitude).sqrt_().add_(1.0)).square_()
    if p == 1.0:
        return u
    if p == 2.0:
        return torch.sub(2.0, u).mul_(u).sqrt_()
    if p == 3.0:
        cube = torch.sub(u, 3.0).mul_(u).add_(3.0).mul_(u)
        fused = torch.compiler.is_dynamo_compiling() and cube.dtype == torch.float32 and _bits_allowed()
        return _cube_root(cube) if fused else cube.pow_(1.0 / 3.0)
    logarithm = torch.where(u < 0.5, u.neg().log1p_(), (threshold / magnitude).log_())
    return logarithm.mul_(p).expm1_().neg_().pow_(1.0 / p)


def _bits_allowed() -> bool:
    """Return whether a traced graph may read a number's bits: not for ONNX, and not under vmap of torch 2.11."""
    exporting = getattr(torch.compiler, "is_exporting", lambda: True)  # torch 2.6 does not have it
    return not (exporting() or transformed())


# Set by hand, since `torch.compiler.assume_constant_result` imports the compiler. torch calls the function while
# tracing, and keeps it out of the graph.
_bits_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]


# The bits of 1.0 in float32. Exponent and mantissa of a number, read as one integer, are almost its logarithm.
_ONE = 0x3F800000


def _cube_root(x: Tensor) -> Tensor:
    """Return the cube root of float32 numbers in (0, 1] to 2 ulp, and exactly 1 of 1; others give undefined values.

    If a compiler fuses it for a CPU, the operator takes a third of the time that it takes with a power
    (`benchmarks.operator`). In eager code it would take longer.

    A third of the logarithm gives z, which is within 9 % of the inverse of the cube root. The series of (1 - h)^(-1/3)
    with h = 1 - x z^3 corrects z. The series of (1 - r)^(-2/3) corrects x z^2.
    """
    logarithm = x.view(torch.int32) - _ONE
    z = (_ONE - (logarithm.float() * (1 / 3)).to(torch.int32)).view(torch.float32)
    h = 1.0 - x * z * z * z
    z = z + z * h * (1 / 3 + h * (2 / 9 + h * (14 / 81)))
    y = x * (z * z)
    r = 1.0 - y * z
    return y + y * (r * (2 / 3 + r * (5 / 9)))


# -- backward ---------------------------------------------------------------------------------------------------------

# Above this number of elements, the gradient is computed in chunks (`benchmarks.operator`).
_SMALL = 1 << 18


def _identity(theta: float | Tensor) -> bool:
    """Return whether the gradient of the weight is that of the output, for pruned elements too."""
    return not isinstance(theta, Tensor) and theta == 1.0


def _save(ctx: Any, pruned: Tensor | None, theta: float | Tensor) -> None:
    """Save what `_gradient` needs: the mask unless the gradient is the identity, and theta."""
    varying = isinstance(theta, Tensor)
    ctx.theta = None if varying else theta
    if not _identity(theta):
        ctx.save_for_backward(pruned, *([theta] if varying else []))


def _gradient(ctx: Any, grad: Tensor, scaled: Callable[[Tensor, Tensor, float | Tensor], Tensor]) -> Tensor:
    """Return the gradient of the weight, given that of the result, from what `_save` saved."""
    if _identity(ctx.theta):
        return grad
    pruned, *varying = ctx.saved_tensors
    return scaled(grad, pruned, varying[0].to(grad.dtype) if varying else ctx.theta)


def _scaled(grad: Tensor, pruned: Tensor, theta: float | Tensor) -> Tensor:
    """Return the gradient with its pruned elements multiplied by theta."""
    return torch.where(pruned, grad * theta, grad)


def _scaled_in_chunks(grad: Tensor, pruned: Tensor, theta: float | Tensor) -> Tensor:
    """Return the result of `_scaled`. On a CPU, a large gradient is computed in chunks that stay in the cache.

    A gradient that is itself differentiated or transformed is computed at once.
    """
    large = grad.device.type == "cpu" and grad.numel() > _SMALL and grad.stride() == pruned.stride()
    if not large or torch.is_grad_enabled() or not concrete(grad):
        return _scaled(grad, pruned, theta)
    out = torch.empty_like(grad)
    for part, mask, new in zip(*(flat(tensor).split(_SMALL) for tensor in (grad, pruned, out)), strict=True):
        torch.mul(part, theta, out=new)
        torch.where(mask, new, part, out=new)
    return out

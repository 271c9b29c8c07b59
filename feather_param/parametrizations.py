"""The Feather operator, and the parametrization that applies it to one weight.

This module knows nothing of models or time: a parametrization reads the threshold of its group
(`SharedThreshold`), and somebody else (`controller.py`) decides what that threshold is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from feather_param.thresholds import flat, kth_magnitude

__all__ = ["FeatherParametrization", "SharedThreshold", "feather_threshold", "originals"]

# Elements the operator handles at a time on a CPU, so that what it makes of them stays in the cache (measured by
# `benchmarks.operator`): where few weights survive, and where it computes with all of them.
_CHUNK = 1 << 19
_DENSE_CHUNK = 1 << 17


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

    Source: Feather (https://arxiv.org/abs/2310.02448), the family of thresholding operators and the scaled
    straight-through gradient.

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


# Note [Sparse where it is sparse]
# The root in P(w) takes most of the time, and at a rate of 95 % nineteen of twenty are taken in vain. So a large
# weight on a CPU is cut with `hardshrink` (0 where |w| <= t), and only what survives is gathered, computed and put
# back. Below a rate of about 70 % gathering costs more than it saves, and everything is computed; a sample of the
# weight decides, which concerns speed alone. The shapes depend on the values, so compiled graphs and other devices,
# where that would mean waiting, always compute everything.


def _shrink_on_cpu(weight: Tensor, threshold: Tensor, p: float, with_mask: bool) -> tuple[Tensor, Tensor | None]:
    """Return what `_shrink` does, in the weight's dtype; see Note [Sparse where it is sparse]."""
    out = torch.empty_like(weight)
    if out.stride() != weight.stride():  # overlapping or with gaps: `empty_like` chose other strides
        weight = out.copy_(weight)
    pruned = torch.empty_like(weight, dtype=torch.bool) if with_mask else None
    source, target = flat(weight), flat(out)
    sample = source[:: source.numel() // 1024]
    few = float((sample.abs() > threshold).float().mean()) < 0.3
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


def _shrink_survivors(weight: Tensor, threshold: Tensor, p: float, out: Tensor) -> Tensor:
    """Return P(weight) of a 1-D weight, in float32 at least, computing only what is not cut; in `out` if it can."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    values = torch.hardshrink(wide, float(threshold), out=out if out.dtype == wide.dtype else None)
    if p == math.inf:
        return values
    index = values.nonzero().squeeze(1)
    kept = values.index_select(0, index)
    magnitude = kept.abs()
    return values.index_copy_(0, index, _factor((magnitude - threshold).div_(magnitude), p).mul_(kept))


class _FeatherThreshold(torch.autograd.Function):
    """`feather_threshold` with its own gradient.

    With theta = 1 the gradient is the identity and nothing is saved; otherwise one byte per weight is.
    The mask is an output because `setup_context`, which torch.func needs, sees only inputs and outputs. There
    is no `jvp` (forward-mode derivatives), because torch.compile refuses a Function that has one.
    """

    @staticmethod
    def forward(weight: Tensor, threshold: Tensor, theta: float, p: float) -> tuple[Tensor, Tensor | None]:
        if weight.device.type == "cpu" and weight.numel() > _DENSE_CHUNK and not torch.compiler.is_compiling():
            return _shrink_on_cpu(weight, threshold, p, with_mask=theta != 1.0)
        out, pruned = _shrink(weight, threshold, p)
        return out.to(weight.dtype), pruned if theta != 1.0 else None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        ctx.theta = inputs[2]
        pruned = output[1]
        if pruned is not None:
            ctx.mark_non_differentiable(pruned)
            ctx.save_for_backward(pruned)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor | None], Any]:
        weight, threshold, theta, p = inputs
        if in_dims[1] is None:  # the operator works element by element: a batch is just a larger weight
            out, pruned = _FeatherThreshold.apply(weight, threshold, theta, p)
            return (out, pruned), (in_dims[0], in_dims[0] if pruned is not None else None)
        weights = [weight] * info.batch_size if in_dims[0] is None else weight.unbind(in_dims[0])
        pairs = zip(weights, threshold.unbind(in_dims[1]), strict=True)
        results = [_FeatherThreshold.apply(*pair, theta, p) for pair in pairs]
        out = torch.stack([result[0] for result in results])
        if theta == 1.0:
            return (out, None), (0, None)
        return (out, torch.stack([result[1] for result in results])), (0, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        slope = grads[0]
        if ctx.theta != 1.0:
            (pruned,) = ctx.saved_tensors
            slope = torch.where(pruned, slope * ctx.theta, slope)
        return slope, None, None, None


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
    leader: SharedThreshold | None

    def __init__(self, total: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.total = total
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("pruned", torch.zeros((), dtype=torch.int64, device=device))
        self.members: dict[str, FeatherParametrization] = {}
        self._readers: set[int] = set()
        self._follow(None)

    def set(self, threshold: Tensor, pruned: int) -> None:
        """Take over a new threshold in place, so that every reader and compiled graph sees it."""
        self._follow(None)
        self._write(threshold, pruned)

    def _write(self, threshold: Tensor, pruned: int) -> None:
        with torch.no_grad():
            self.threshold.copy_(threshold)
            self.pruned.fill_(pruned)

    def _follow(self, leader: SharedThreshold | None) -> None:
        object.__setattr__(self, "leader", leader)  # a plain reference: not a submodule

    def read(self, reader: FeatherParametrization) -> Tensor:
        """Return the threshold for a forward pass of one of the weights."""
        if self.leader is not None and not torch.compiler.is_compiling():
            if not self._readers or id(reader) in self._readers:  # a new pass begins: the weights may be new
                self._readers.clear()
                self.catch_up()
            self._readers.add(id(reader))
        return self.threshold

    def catch_up(self) -> None:
        """Bring the threshold of a copy up to date with its weights; see Note [Copies]."""
        weights = {name: member.dense() for name, member in self.members.items()}
        if self.leader is None or sum(weight.numel() for weight in weights.values()) != self.total:
            return
        pruned = int(self.pruned)
        if pruned and torch.equal(kth_magnitude(weights, pruned).to(self.threshold.device), self.threshold):
            return
        pruned = int(self.leader.pruned)
        self._write(kth_magnitude(weights, pruned), pruned)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedThreshold:
        twin = SharedThreshold(self.total, self.threshold.device)
        memo[id(self)] = twin
        twin._write(self.threshold, int(self.pruned))
        twin._follow(self.leader or self)
        return twin.train(self.training)

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
# plain references in a deepcopy lead to the copy's own threshold, so that it stands alone.

# Note [Copies]
# A deepcopy of a sparsified model is either a snapshot (best model so far) or a moving average, and nobody tells
# which. No controller steps it, and an averaging loop may average the buffers, sync them or leave them alone. So a
# copy decides by its numbers. Where the stored threshold is the k-th magnitude of its own weights for the stored k, it
# is a snapshot: nothing changes. Otherwise its weights have moved since, and it takes the k of the model
# it was copied from (the "leader"), as that stands now, and the threshold from its own weights. k = 0 fits any
# weights, so a copy from before the pruning began counts as moving. A copy finds its weights through `members`,
# which its parametrizations fill as they are copied.


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
        >>> _ = parametrize.register_parametrization(layer, "weight", FeatherParametrization(shared))
        >>> shared.set(torch.tensor(1.0), pruned=1)
        >>> layer.weight
        tensor([[-1.9129,  0.0000]], grad_fn=<_FeatherThresholdBackward>)
    """

    shared: SharedThreshold
    _place: tuple[str, parametrize.ParametrizationList] | None

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
        self._place = None

    def join(self, name: str, place: parametrize.ParametrizationList) -> None:
        """Become the member of the group that stands for the weight ``name``, kept at ``place``."""
        self._place = (name, place)
        self.shared.members[name] = self

    def dense(self) -> Tensor:
        """Return the weight as it comes to this parametrization: past those registered before it."""
        assert self._place is not None
        place = self._place[1]
        values: list[Any] = list(originals(place))
        for parametrization in place:
            if parametrization is self:
                break
            values = [parametrization(*values)]
        (value,) = values
        return value

    def forward(self, weight: Tensor) -> Tensor:
        threshold = self.shared.read(self).to(weight.device)
        return feather_threshold(weight, threshold, self.theta, self.p)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Make ``layer.weight = w`` store ``w`` as the dense weight."""
        return weight

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatherParametrization:
        twin = FeatherParametrization.__new__(FeatherParametrization)
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        if twin._place is not None:
            twin.join(*twin._place)
        return twin

    def extra_repr(self) -> str:
        return f"p={self.p}, theta={self.theta}"


def originals(place: parametrize.ParametrizationList) -> list[nn.Parameter]:
    """Return the Parameters that a parametrized tensor is made from; most parametrizations take just one."""
    names = ["original"] if place.is_tensor else [f"original{i}" for i in range(place.ntensors)]
    return [getattr(place, name) for name in names]

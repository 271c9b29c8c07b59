"""The parametrization that applies the Feather operator to one weight.

It knows nothing of models or time: it reads the threshold of its group (`SharedThreshold`), and somebody else
(`controller.py`) decides what that threshold is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from feather_param.groups import NO_CEILING, SharedThreshold
from feather_param.shards import is_sharded, local, whole
from feather_param.thresholding import feather_threshold, smallest_kept

__all__ = ["FeatherParametrization", "feather_threshold", "originals"]


class FeatherParametrization(nn.Module):
    """Reparametrize a weight by the Feather operator with the threshold of its group.

    Made by :func:`feather_param.sparsify`; for use with :mod:`torch.nn.utils.parametrize`.

    Args:
        shared: the threshold that this weight's group shares.
        owner: whether ``shared`` is registered here; true for exactly one weight of the group
            (see Note [One threshold, many readers] in `groups`).
        p: exponent of the operator.
        theta: scale of the gradient of the pruned weights; None takes the one that ``shared`` holds.
        parameter_order: names of the layer's parameters before any parametrization, to restore their order.

    Attributes:
        ceiling: where the number of zeros has a cap, the threshold that gives so many (a 0-dim float32 buffer);
            the smaller one of the two thresholds counts.
        mask: once frozen, which weights survive, whatever their magnitude (bool, the weight's shape); else None.
            It is not saved: the dense weight has its zeros where the mask has, see Note [Frozen weights].

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
    ceiling: Tensor | None
    mask: Tensor | None
    _place: tuple[str, parametrize.ParametrizationList] | None

    def __init__(
        self,
        shared: SharedThreshold,
        *,
        owner: bool = True,
        p: float = 3.0,
        theta: float | None = 1.0,
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
        self.register_buffer("ceiling", None)
        self.mask = None
        self._place = None
        self._first: FeatherParametrization | None
        object.__setattr__(self, "_first", None)

    def join(self, name: str, place: parametrize.ParametrizationList) -> None:
        """Become the member of the group that stands for the weight ``name``, kept at ``place``."""
        self._place = (name, place)
        self.shared.members[name] = self
        if name in self.shared.caps and self.ceiling is None:
            self.ceiling = torch.full((), NO_CEILING, dtype=torch.float32, device=self.shared.threshold.device)

    def tie(self, first: FeatherParametrization) -> None:
        """Stand for a further place of the weight that ``first`` stands for."""
        object.__setattr__(self, "_first", first)

    @property
    def member(self) -> FeatherParametrization:
        """The one that stands for the weight in its group: another one at the further places of a tied weight."""
        return self._first or self

    @property
    def name(self) -> str:
        """The name that the weight had when it was sparsified."""
        assert self._place is not None
        return self._place[0]

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

    def versions(self) -> list[tuple[int, int]]:
        """Return what changes whenever the dense weight is written to, but for writes past autograd (``.data``)."""
        assert self._place is not None
        return [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in originals(self._place[1])]

    def forward(self, weight: Tensor) -> Tensor:
        first = self.member
        if first.mask is not None:
            return torch.where(first.mask.to(weight.device), weight, 0.0)
        threshold = self.shared.read(self)
        if first.ceiling is not None:
            threshold = torch.minimum(threshold.to(weight.device), first.ceiling.to(weight.device))
        theta = self.shared.theta.to(weight.device) if self.theta is None else self.theta
        return feather_threshold(weight, threshold.to(weight.device), theta, self.p)

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatherParametrization:
        before = self.ceiling
        super()._apply(fn, recurse)
        if before is not None and self.ceiling is not None:
            if before.is_meta:
                self.ceiling = torch.full_like(self.ceiling, NO_CEILING, dtype=torch.float32)
            elif self.ceiling.dtype != torch.float32:
                self.ceiling = before.to(self.ceiling.device)
        if self.mask is not None:
            self.mask = self.mask.to(fn(self.mask).device)
        return self

    # Note [Frozen weights]
    # Once frozen, the threshold is 0 and the dense weight itself has the zeros: an optimizer step may move them
    # (momentum, weight decay), the mask keeps that from the forward pass, and `hold` sets them to zero again, after
    # each step and before each save. So the state_dict has no other entries than before: whoever walks over the
    # states of a model and its average side by side still pairs the right ones, and the state alone is
    # enough to evaluate, to bake and to find the mask again.

    def hold(self) -> None:
        """Set the pruned elements of a frozen dense weight to zero, and those that are kept to anything else."""
        if self.mask is None or self._place is None or len(self._place[1]) > 1:
            return  # what other libraries' parametrizations make is held by `baking.hold`
        with torch.no_grad():
            original: Any = originals(self._place[1])[0]
            mask = local(self.mask, original)
            part = original.to_local() if is_sharded(original) else original
            part.copy_(torch.where(mask, torch.where(part == 0, smallest_kept(part.dtype), part), 0.0))

    def find_mask(self) -> None:
        """Take the mask from the zeros of the dense weight; before the pruning has begun, none of them was pruned."""
        with torch.inference_mode(False), torch.no_grad():
            begun = bool(self.shared.pruned)
            dense = whole(self.dense())
            self.mask = dense != 0 if begun else torch.ones_like(dense, dtype=torch.bool)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.hold()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        return f"p={self.p}, theta={self.theta}" + (", frozen" if self.member.mask is not None else "")


def originals(place: parametrize.ParametrizationList) -> list[nn.Parameter]:
    """Return the Parameters that a parametrized tensor is made from; most parametrizations take just one."""
    names = ["original"] if place.is_tensor else [f"original{i}" for i in range(place.ntensors)]
    return [getattr(place, name) for name in names]

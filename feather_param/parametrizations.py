"""The parametrization that applies the Feather operator to a weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from feather_param.core.shared import SharedSparsity
from feather_param.core.versions import checksum_of, version_of
from feather_param.ops.distributed import is_sharded, local
from feather_param.ops.masking import masked
from feather_param.ops.operator import feather_threshold

__all__ = ["FeatherParametrization", "feather_threshold"]


class FeatherParametrization(nn.Module):
    """Reparametrize a weight by the Feather operator, with a threshold that the controller writes.

    Made by :func:`feather_param.sparsify`; for use with :mod:`torch.nn.utils.parametrize`.

    Attributes:
        threshold: the threshold of this weight: a 0-dim buffer, float64 if the weight is, else float32. It is not
            saved, since it follows from the weights and the number of zeros.
        mask: None, or once frozen the elements that are kept (bool, of the weight's shape). It is not saved, since
            the dense weight is zero where the mask is False.

    Shape:
        ``forward`` maps a weight of any shape to one of the same shape and dtype.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.weight = nn.Parameter(torch.tensor([[-2.0, 0.5]]))
        >>> controller = feather_param.sparsify(layer, final_rate=0.5, total_steps=1, end_step=0)
        >>> layer.parametrizations.weight[0].threshold, layer.weight
        (tensor(0.5000), tensor([[-1.9895,  0.0000]], grad_fn=<_FeatherThresholdBackward>))
    """

    shared: SharedSparsity
    threshold: Tensor
    mask: Tensor | None

    def __init__(self, shared: SharedSparsity) -> None:
        super().__init__()
        object.__setattr__(self, "shared", shared)  # no submodule; `attach` makes it one of the first parametrization
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32), persistent=False)
        self.mask = None
        self.register_load_state_dict_post_hook(lambda feather, _: feather.shared.note_loaded(feather))

    def forward(self, weight: Tensor) -> Tensor:
        shared = self.shared
        compiling = torch.compiler.is_compiling()
        if self.mask is None:
            if not compiling:
                shared.refresh_if_changed(self)
            elif shared.source is not None:  # a copy has no controller to refresh it, so this breaks the graph
                shared.refresh_if_possible()
        if self.mask is not None:
            return torch.where(self.mask, weight, 0.0)
        theta: Any = shared.config.theta if shared.theta is None else shared.theta
        value = feather_threshold(weight, self.threshold, theta, shared.config.p)
        if shared.source is not None and value.requires_grad and not compiling:
            value.register_hook(lambda gradient: shared.note_gradient())
        return value

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the weight, so that ``layer.weight = w`` sets the dense weight to ``w``."""
        return weight

    def restore_zeros(self) -> None:
        """Set the pruned elements of a frozen dense weight to zero, and kept elements to other numbers.

        A weight with parametrizations of other libraries is left as it is; `core.freezing.hold` does this for it.
        """
        own = self.shared.registrations.get(self)
        if self.mask is None or own is None or own.stacked:
            return
        with torch.no_grad():
            original: Any = own.originals[0]
            part = original.to_local() if is_sharded(original) else original
            part.copy_(masked(part, local(self.mask, original)))

    def train(self, mode: bool = True) -> FeatherParametrization:
        if (not mode or not self.training) and (own := self.shared.registrations.get(self)) is not None:
            own.invalidate()  # not if train() is called again: some loops do so before each batch
        return super().train(mode)

    def _save_to_state_dict(self, *args: Any) -> None:  # type: ignore[override]
        self.restore_zeros()
        super()._save_to_state_dict(*args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatherParametrization:
        before, own = self.threshold, self.shared.registrations.get(self)
        if own is not None and own.checksum is not None:
            # A cast of a copy is no change of its weights, and must not hide one.
            if own.checksum.differs(checksum_of(own.originals)):
                self.shared.follow_source()
            own.checksum = checksum_of([fn(original.detach()) for original in own.originals])
        super()._apply(fn, recurse)
        if self.threshold.dtype != before.dtype:
            self.threshold = before.to(self.threshold.device)
        elif before.is_meta:
            self.threshold.zero_()  # after `to_empty`
        if self.mask is not None:
            without_values = self.mask.is_meta or self.threshold.is_meta
            self.mask = None if without_values else self.mask.to(self.threshold.device)
        if own is not None:
            own.note_written()
            own.invalidate()
            overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
            replaces = overwrites or before.is_meta or self.threshold.is_meta
            if replaces and not any(map(is_sharded, own.originals)):
                own.computed_from = None  # torch is about to replace the Parameter
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatherParametrization:
        """Return the parametrization of a copy, and register it with the copy's shared state."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with torch.inference_mode(False):  # nothing could write to inference tensors
            vars(twin).update(copy.deepcopy(vars(self), memo))
        own = self.shared.registrations.get(self)
        if own is None or not {id(own.parametrizations), id(own.place.module)} <= memo.keys():
            return twin
        place = replace(own.place, module=memo[id(own.place.module)])
        new = replace(own, place=place, reader=twin, parametrizations=memo[id(own.parametrizations)])
        new.computed_from = None
        if all(id(tensor) in memo for tensor in own.inputs):
            new.computed_from = version_of([memo[id(tensor)] for tensor in own.inputs])
            if own.changed(or_replaced=True):
                new.computed_from = new.computed_from._replace(writes=-1)
        new.checksum = checksum_of(own.originals)
        twin.shared.registrations[twin] = new
        return twin

    def extra_repr(self) -> str:
        frozen = ", frozen" if self.mask is not None else ""
        return f"p={self.shared.config.p}, theta={self.shared.config.theta}{frozen}"


def states_of(model: nn.Module) -> list[SharedSparsity]:
    """Return the shared state of each part of a model that was sparsified by itself."""
    found = [module.shared for module in model.modules() if isinstance(module, FeatherParametrization)]
    return list(dict.fromkeys(found))

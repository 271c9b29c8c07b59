"""The parametrization that applies the Feather operator to a weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from feather_param.core.shared import SharedSparsity
from feather_param.core.versions import checksum_of
from feather_param.ops.distributed import is_sharded, local, shard
from feather_param.ops.masking import with_exact_zeros
from feather_param.ops.memory import require_own_elements
from feather_param.ops.operator import feather_threshold

__all__ = ["FeatherParametrization", "feather_threshold"]


class FeatherParametrization(nn.Module):
    """Reparametrize a weight by the Feather operator, with a threshold that the controller writes.

    `feather_param.sparsify` makes it, for use with `torch.nn.utils.parametrize`.

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
        object.__setattr__(self, "shared", shared)  # a plain attribute; `attach` makes it a submodule of one
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32), persistent=False)
        self.mask = None
        self.register_load_state_dict_post_hook(lambda feather, _: feather.shared.note_loaded(feather))

    def forward(self, weight: Tensor) -> Tensor:
        shared = self.shared
        compiling = torch.compiler.is_compiling()
        if self.mask is None:
            if not compiling:
                self._refresh_if_changed()
            elif shared.source is not None:  # a copy may have no controller, so it refreshes itself: a graph break
                shared.refresh_if_possible()
        if self.mask is not None:
            return torch.where(self.mask, weight, 0.0)
        config = shared.config
        value = config.pattern.shrink(weight, self.threshold, shared.gradient_scale, config.p)
        if shared.source is not None and value.requires_grad and not compiling:
            value.register_hook(lambda gradient: shared.note_gradient())
        return value

    def _refresh_if_changed(self) -> None:
        called = self.shared.registrations.get(self)
        if called is None:  # a shallow copy, as nn.DataParallel makes them, has the buffer of the registered one
            every = self.shared.registrations.values()
            called = next((each for each in every if each.reader.threshold is self.threshold), None)
        if called is not None:
            self.shared.refresh_if_changed(called)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the weight, so that ``layer.weight = w`` sets the dense weight to ``w``."""
        return weight

    def restore_zeros(self) -> None:
        """Set the pruned elements of a frozen dense weight to zero. A kept zero becomes a negligible number.

        A weight with parametrizations of other libraries is left as it is; see `core.freezing.restore_zeros`.
        """
        own = self.shared.registrations.get(self)
        if self.mask is None or own is None or own.stacked:
            return
        with torch.no_grad():
            original = own.originals[0]
            require_own_elements(own.place.name, original)
            part = shard(original)
            part.copy_(with_exact_zeros(part, local(self.mask, original)))

    def train(self, mode: bool = True) -> FeatherParametrization:
        if (not mode or not self.training) and (own := self.shared.registrations.get(self)) is not None:
            own.invalidate()  # not in training mode already: some loops call train() before each batch
        return super().train(mode)

    def _save_to_state_dict(self, *args: Any) -> None:  # type: ignore[override]
        self.restore_zeros()
        super()._save_to_state_dict(*args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatherParametrization:
        before, own = self.threshold, self.shared.registrations.get(self)
        if own is not None and own.checksum is not None:
            # A cast of a copy does not count as a change. A change before the cast must still be found.
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
            future = torch.__future__
            converts = future.get_overwrite_module_params_on_conversion()
            converts = converts or future.get_swap_module_params_on_conversion()
            if any(map(is_sharded, own.originals)):
                own.forget()  # torch is about to swap the Parameter with a converted one
            elif converts or before.is_meta or self.threshold.is_meta:
                own.computed_from = None  # torch is about to replace or swap the Parameter
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatherParametrization:
        """Return the parametrization of a copy, and register it with the copy's shared state."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        with torch.inference_mode(False):  # inference tensors could not be written to later
            vars(twin).update(copy.deepcopy(vars(self), memo))
        own = self.shared.registrations.get(self)
        if own is not None and (copied := own.for_copy(twin, memo)) is not None:
            twin.shared.registrations[twin] = copied
        return twin

    def extra_repr(self) -> str:
        frozen = ", frozen" if self.mask is not None else ""
        return f"p={self.shared.config.p}, theta={self.shared.config.theta}{frozen}"


def is_sparsified(model: nn.Module) -> bool:
    """Return whether a weight of a model is sparsified."""
    return any(isinstance(module, FeatherParametrization) for module in model.modules())


def states_of(model: nn.Module) -> list[SharedSparsity]:
    """Return the shared state of each part of a model that was sparsified by itself."""
    found = [module.shared for module in model.modules() if isinstance(module, FeatherParametrization)]
    return list(dict.fromkeys(found))

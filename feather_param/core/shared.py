"""The state that all parametrizations of a model share.

Note [Thresholds]

The controller calls `move_to` at each step. It lets the allocation compute the thresholds from the weights and the
number of zeros, and keeps them in the `Position`, which reports and bakes read. `_write_thresholds` copies them into a
buffer of each parametrization, in the precision of its weight. Forward passes and compiled graphs read this buffer.
A deepcopy has its own buffers and its own position. Both positions refer to the same threshold tensors until one of
them gets new ones; nothing writes to these tensors.

A threshold is valid for the weights that it was computed from. So each registration keeps the version of its weight:
the identity of the Parameter, and the number of writes to it, which torch counts. A forward pass that finds another
version computes all thresholds again, for the same number of zeros. A layer's pass checks its own weight. A layer that
is called a second time since all weights were checked begins a new pass of the model, and all weights are checked.
`train()`, `eval()`, `to()` and loading invalidate the versions, since they may follow writes that torch does not count.

A forward pass does not compute thresholds

* inside a backward pass: with activation checkpointing, a layer that is computed again must find the threshold of the
  first time, even if the optimizer has stepped in between;
* if its Parameter was replaced for this pass (FSDP2 gathers one, `torch.func` passes its own), or its buffer was;
* on tensors without values (tracers, the meta device) and inference tensors, and in compiled graphs.

`Controller.refresh` is for these cases.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from feather_param.allocations import Budget, Group, count_zeros, masks
from feather_param.core.config import Config
from feather_param.core.copies import Source, have_changed, source_of_copy
from feather_param.core.position import Position, unpack
from feather_param.core.registration import Registration, require_tied, require_values
from feather_param.core.state_dict import POSITION
from feather_param.core.versions import checksum_of
from feather_param.ops.count import PruneCount
from feather_param.ops.distributed import held_here, is_sharded, whole
from feather_param.ops.dtypes import rounded_down
from feather_param.ops.finite import require_finite
from feather_param.ops.tracing import concrete, eager
from feather_param.utils.warn import warn


class SharedSparsity(nn.Module):
    """The settings, the position and the registrations of a sparsified model. The controller writes, others read.

    It is a submodule of one parametrization, the first in the model's order, and a plain attribute of the others. So
    ``state_dict``, ``to`` and ``deepcopy`` reach it once. Its position is saved as torch's *extra state*, a small
    integer tensor in the model's ``state_dict`` that no tool averages or casts.
    """

    def __init__(self, config: Config, budget: Budget) -> None:
        super().__init__()
        self.config, self.budget = config, budget
        self.position = Position()
        self.registrations: dict[nn.Module, Registration] = {}  # by parametrization, in the model's order
        self.source: Source | None = None  # of a copy, see Note [Copies]
        # Where theta changes during training: the current gradient scale of pruned elements.
        self.theta = torch.ones((), dtype=torch.float32, device="cpu") if callable(config.theta) else None
        self._called: set[nn.Module] = set()  # parametrizations called since all weights were checked
        self._gathered = False  # the weights are sharded, and each forward pass gets new tensors
        # While a state_dict is being loaded: the position in it, and the parametrizations whose weights are missing.
        self._loading: tuple[Position, set[nn.Module]] | None = None

    @property
    def frozen(self) -> bool:
        """Whether the masks are fixed."""
        return self.position.frozen_step is not None

    @property
    def final_zeros(self) -> int:
        """The number of zeros at the end of the schedule."""
        return self.budget.zeros(self.config.final_rate)

    @property
    def complete(self) -> bool:
        """Whether all weights are here. A deepcopy of a part of the model has only some."""
        return len({each.weight for each in self.registrations.values()}) == len(self.budget.sizes)

    @property
    def originals(self) -> list[Tensor]:
        """The Parameters of all weights."""
        return [original for each in self.registrations.values() for original in each.originals]

    @property
    def sharded(self) -> bool:
        """Whether a weight is sharded over processes."""
        return any(map(is_sharded, self.originals))

    def weights(self) -> dict[str, Tensor]:
        """Return the dense weights by name.

        Raises:
            ValueError: places that were tied when they were sparsified no longer are.
        """
        require_tied(self.registrations.values())
        first: dict[str, Registration] = {}
        for each in self.registrations.values():
            first.setdefault(each.weight, each)
        return {name: first[name].dense() for name in self.budget.sizes if name in first}

    # -- thresholds and masks ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def move_to(self, step: int, frozen_step: int | None = None) -> None:
        """Go to a step of the schedule and compute its thresholds, or its masks if frozen. On an error, do nothing."""
        self._loading = None
        rate = self.config.rate(step if frozen_step is None else frozen_step)
        self.config.theta_at(rate)  # raises
        zeros = self.budget.zeros(rate)
        if frozen_step is None:
            self._compute_thresholds(zeros)
            self.set_masks(None)
        elif not self.frozen or self._masks_are_missing:
            self.set_masks(self._masks_for(zeros))
            self.position.zeros = zeros
        self.position.step, self.position.frozen_step = step, frozen_step
        self._write_theta()

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the thresholds again from the current weights. If frozen, compute masks that are missing."""
        require_values(self.registrations.values())
        self.follow_source()
        if not self.frozen:
            self._compute_thresholds(self.position.zeros)
        elif self._masks_are_missing:
            self.set_masks(self._masks_for(self.position.zeros))

    def refresh_checked(self) -> None:
        """Refresh before a report or a bake, and refuse NaN and infinity, also on a GPU and in frozen weights."""
        if self.frozen or any(each.device.type != "cpu" for each in self.originals):  # else `refresh` refuses them
            require_finite(*held_here(self.weights()))
        self.refresh()

    def refresh_if_changed(self, reader: nn.Module | None = None) -> None:
        """Refresh if the weights have changed since the thresholds were computed; see Note [Thresholds].

        Args:
            reader: the parametrization whose forward pass asks; None: check all weights.
        """
        own = None if reader is None else self.registrations.get(reader)
        if self._gathered or (reader is not None and (own is None or own.buffer_replaced)):
            return
        if own is None or reader in self._called or not self._called:
            self._called.clear()
            checked = [*self.registrations.values()]
        else:
            checked = [own]
        if reader is not None:
            self._called.add(reader)
        if any(each.changed(or_replaced=own is None) for each in checked):
            self.refresh_if_possible()
        elif any(each.buffer_overwritten and concrete(each.reader.threshold) for each in checked):
            self._write_thresholds()

    @eager
    def refresh_if_possible(self) -> None:
        """Refresh if all weights have values and this is no backward pass."""
        if torch._C._current_graph_task_id() != -1 or self._gathered or not self.registrations:
            return
        if all(isinstance(each, nn.Parameter) and concrete(each) and not each.is_meta for each in self.originals):
            self.refresh()

    def masks(self) -> dict[str, Tensor]:
        """Return the mask of each weight, by the current thresholds: bool tensors, True where an element is kept."""
        if self.frozen:
            every = self.registrations.values()
            return {each.weight: each.reader.mask for each in every if each.reader.mask is not None}
        return masks(self.weights(), self.position.groups)

    def exact_masks(self) -> dict[str, Tensor]:
        """Return the masks that a bake would use. Refresh only where the number of zeros would not be exact."""
        if not (self.frozen or self.sharded or self.source):  # a copy that has changed has another number of zeros
            require_values(self.registrations.values())
            self.refresh_if_changed()
            found = self.masks()
            if sum(int(mask.sum()) for mask in found.values()) == self.budget.total - self.position.zeros:
                return found
        self.refresh_checked()
        return self.masks()

    def counts(self) -> dict[str, PruneCount]:
        """Return the zeros and ties of each weight, by the current thresholds or masks."""
        if self.frozen:
            return {name: PruneCount(int((~mask).sum())) for name, mask in self.masks().items()}
        return count_zeros(self.weights(), self.position.groups)

    def set_masks(self, fixed: Mapping[str, Tensor] | None) -> None:
        """Let the forward pass use fixed masks, by name of the weight; None: use the thresholds again."""
        for each in self.registrations.values():
            each.reader.mask = None if fixed is None else fixed[each.weight]

    @property
    def _masks_are_missing(self) -> bool:
        return any(each.reader.mask is None for each in self.registrations.values())

    def _masks_for(self, zeros: int) -> dict[str, Tensor]:
        """Return masks with a number of zeros, at the smallest magnitudes: first at the elements that are zero."""
        require_values(self.registrations.values())
        weights = self.weights()
        with torch.inference_mode(False):  # inference tensors could not be part of a later backward pass
            if not zeros:  # an element that is zero before the pruning begins is not pruned
                return {name: torch.ones_like(whole(weight), dtype=torch.bool) for name, weight in weights.items()}
            return masks(weights, self.config.allocation(weights, zeros, self.budget.guards))

    def _compute_thresholds(self, zeros: int) -> None:
        if self.complete:  # else the thresholds are those of the source
            self.position.groups = self.config.allocation(self.weights(), zeros, self.budget.guards)
        self.position.zeros = zeros
        self._write_thresholds()
        self._gathered = self.sharded
        for each in self.registrations.values():
            each.note_computed()
            each.checksum = None if self.source is None else checksum_of(each.originals)

    def _write_thresholds(self) -> None:
        """Copy the thresholds into the buffers of the parametrizations."""
        thresholds = self.position.thresholds
        values: list[Tensor] = []
        rounded: dict[tuple[int, torch.dtype], Tensor] = {}  # most weights have the same threshold
        with torch.inference_mode(False), torch.no_grad():
            for each in self.registrations.values():
                like, old = each.originals[0], each.reader.threshold
                key = id(threshold := thresholds[each.weight]), like.dtype
                if key not in rounded:
                    rounded[key] = rounded_down(threshold, like.dtype)
                value = rounded[key]
                values.append(value)
                if old.dtype != value.dtype or old.device != like.device or old.is_inference() or each.buffer_replaced:
                    each.reader.threshold = torch.empty_like(value, device=like.device)
            buffers = [each.reader.threshold for each in self.registrations.values()]
            torch._foreach_copy_(buffers, values)  # pyright: ignore[reportPrivateImportUsage]
        for each in self.registrations.values():
            each.note_written()

    def _write_theta(self) -> None:
        if self.theta is not None:
            self.theta.fill_(self.config.theta_at(self.config.rate(self.position.step)))

    # -- copies, see Note [Copies] ----------------------------------------------------------------------------------

    def follow_source(self) -> None:
        """Of a copy whose weights have changed, take the position of its source."""
        own, source = self.position, self.source
        if source is None or self.frozen:
            return
        if not self.complete:
            # A part of the model cannot break ties: all elements that equal the threshold are pruned.
            here = {each.weight for each in self.registrations.values()}
            groups = source.position.groups if have_changed(self.registrations.values()) else own.groups
            own.groups = [
                Group(tuple(name for name in each.names if name in here), self.budget.total, each.threshold.clone())
                for each in groups
            ]
            return
        now = self.position_now()
        if now is own:
            return
        if source.trained and now.zeros != own.zeros:
            warn(
                f"a copy of a sparsified model is trained, and no controller steps it: it had {own.zeros:,} zeros and "
                f"takes the {now.zeros:,} of the model that it was copied from, as a moving average does; to give it "
                "a schedule of its own, copy both: model, controller = copy.deepcopy((model, controller))"
            )
        own.zeros, own.step = now.zeros, now.step
        self._write_theta()

    def position_now(self) -> Position:
        """Return the position for the current weights."""
        own, source = self.position, self.source
        if source is None or self.frozen or not self.complete or not have_changed(self.registrations.values()):
            return own
        return source.applied_to(own)

    def note_gradient(self) -> None:
        """Note that a gradient has reached a weight of this copy. A copy with a controller follows no source then."""
        if self.source is not None:
            self.source.trained = True
            if self.source.controlled:
                self.source = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedSparsity:
        """Return the shared state of a copy. The copied parametrizations add their registrations to it."""
        twin = type(self)(self.config, self.budget)
        memo[id(self)] = twin
        twin.position = replace(self.position_now())
        twin.source = source_of_copy(self.position, self.source, twin.position, memo)
        if self.theta is not None:
            with torch.inference_mode(False):
                twin.theta = torch.empty_like(self.theta)
            twin._write_theta()
        return twin.train(self.training)

    # -- the position in the model's state_dict ---------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """Return the position as a tensor, see `Position.pack`."""
        return self.position_now().pack()

    def set_extra_state(self, state: Any) -> None:
        """Note a saved position. The model moves there when all its weights have been loaded."""
        self._loading = unpack(state, self.budget.total, POSITION), set(self.registrations)

    def note_loaded(self, feather: nn.Module) -> None:
        """Note that the weight of a parametrization was loaded. After the last one, refresh."""
        own = self.registrations.get(feather)
        if own is not None:
            own.invalidate()
            own.checksum = None
        if self._loading is not None:
            loaded, missing = self._loading
            missing.discard(feather)
            if not missing:
                own_position = self.position  # copies refer to this object
                own_position.zeros, own_position.step = loaded.zeros, loaded.step
                own_position.frozen_step = loaded.frozen_step
                self._loading = None
                self._write_theta()
                self.set_masks(None)
        if feather is next(reversed(self.registrations), None):
            with contextlib.suppress(ValueError):  # NaN is refused when the weights are used, not when they are loaded
                self.refresh_if_possible()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:  # type: ignore[override]
        *_, missing, _, errors = args
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        except ValueError as error:  # torch raises all messages together at the end
            errors.append(str(error))
        missing[:] = [name for name in missing if name != f"{prefix}_extra_state"]  # a plain model's state has none

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedSparsity:
        if self.theta is not None and (device := fn(self.theta).device) != self.theta.device:
            self.theta = torch.empty((), dtype=torch.float32, device=device)
            self._write_theta()
        return self

"""The state that all parametrizations of a model share.

Note [Thresholds]

The controller calls `move_to` at each step. It lets the allocation compute the thresholds from the weights and the
number of zeros, and keeps them in the `Position`, which reports and bakes read. `_write_thresholds` copies them into a
buffer of each parametrization, in the precision of its weight. Forward passes and compiled graphs read this buffer.
A deepcopy has its own buffers and its own position. Both positions refer to the same threshold tensors until one of
them gets new ones; nothing writes to these tensors.

A threshold is valid for the weights that it was computed from. So each registration keeps a reference to its Parameter
and the number of writes to it, which torch counts. A forward pass that finds more writes computes all thresholds again,
for the same number of zeros. The first layer of a pass of the model checks all weights, and each later layer checks its
own. A pass ends when a layer is called a second time. `train()`, `eval()`, `to()` and loading mark all thresholds as
out of date, since they may follow writes that torch does not count.

A forward pass does not compute thresholds in these cases:

* inside a backward pass: with activation checkpointing, a layer that is computed again must find the threshold of the
  first time, even if the optimizer has stepped in between;
* if its Parameter was replaced for this pass (FSDP2 gathers one, `torch.func` passes its own), or its buffer was;
* on tensors without values (tracers, the meta device) and inference tensors, and in compiled graphs.

In the second and the third case, `Controller.refresh` computes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from feather_param.core.bake_settings import BakeSettings
from feather_param.core.budget import Budget
from feather_param.core.config import Config
from feather_param.core.copies import Copyable
from feather_param.core.exact_values import masks_of_frozen
from feather_param.core.position import Position
from feather_param.core.registration import Registration, first_places
from feather_param.core.saved_position import pack, unpack_position
from feather_param.core.state_dict import POSITION
from feather_param.core.versions import checksum_of
from feather_param.ops.count import PruneCount
from feather_param.ops.distributed import held_here, is_sharded
from feather_param.ops.dtypes import rounded_down
from feather_param.ops.finite import require_finite
from feather_param.ops.groups import Group
from feather_param.ops.tracing import concrete, eager
from feather_param.ops.values import require_values, without_values_if_one_is


class SharedSparsity(Copyable):
    """The thresholds and masks of a sparsified model, with its settings, its position and its registrations.

    It is a submodule of one parametrization, the first in the model's order, and a plain attribute of the others. So
    ``state_dict``, ``to`` and ``deepcopy`` reach it once. Its position and the settings of a bake are saved as torch's
    *extra state*, a small integer tensor in the model's ``state_dict`` that no tool averages or casts.
    """

    def __init__(self, config: Config, budget: Budget) -> None:
        super().__init__(config, budget)
        self._called: set[Registration] = set()  # those called since all weights were checked
        self._was_sharded = False  # at the last refresh; then each forward pass gets new Parameters
        # While a state_dict is being loaded: the position in it, and the parametrizations whose weights are missing.
        self._loading: tuple[Position, set[nn.Module]] | None = None

    @property
    def final_zeros(self) -> int:
        """The number of zeros at the end of the schedule."""
        return self.budget.zeros(self.config.final_rate)

    @property
    def gradient_scale(self) -> float | Tensor:
        """Theta, the gradient scale of pruned elements, as forward passes use it."""
        return self.config.theta_at(self.config.final_rate) if self.theta is None else self.theta

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
        first = first_places(self.registrations.values())
        return {name: first[name].dense() for name in self.budget.sizes if name in first}

    def outputs(self) -> dict[str, int]:
        """Return the number of outputs that each weight computes, by name; of a tied weight, those of the largest."""
        shapes = {name: weight.shape for name, weight in self.weights().items()}
        found = dict.fromkeys(shapes, 0)
        for each in self.registrations.values():
            found[each.name] = max(found[each.name], each.place.outputs(shapes[each.name]))
        return found

    def require_values(self) -> None:
        """Raise a RuntimeError that names the first weight without values (meta device), if there is one."""
        places = self.registrations.values()
        require_values((each.place.name, original) for each in places for original in each.originals)

    # -- thresholds and masks ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def move_to(self, step: int, frozen_step: int | None = None) -> None:
        """Go to a step of the schedule, with its thresholds, or masks if frozen. On an error nothing changes."""
        self._loading = None
        rate = self.config.rate(step if frozen_step is None else frozen_step)
        self.config.theta_at(rate)  # raises
        zeros = self.budget.zeros(rate)
        if frozen_step is None:
            self._compute_thresholds(zeros)
            self.set_masks(None)
        elif not self.frozen or self._masks_are_missing:
            self._find_masks(zeros)
        self.position.step, self.position.frozen_step = step, frozen_step
        self.write_theta()

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the thresholds again from the current weights. If frozen, compute masks that are missing."""
        self.require_values()
        self.follow_source()
        if not self.frozen:
            self._compute_thresholds(self.position.zeros)
        elif self._masks_are_missing:
            self._find_masks(self.position.zeros)

    def refresh_checked(self) -> None:
        """Refresh before a report or a bake, and refuse NaN and infinity, also on a GPU and in frozen weights."""
        if self.frozen or any(each.device.type != "cpu" for each in self.originals):  # else `refresh` refuses them
            self.require_values()
            require_finite(*held_here(self.weights()))
        self.refresh()

    def refresh_if_changed(self, called: Registration | None = None) -> None:
        """Refresh if the weights have changed since the thresholds were computed; see Note [Thresholds].

        Args:
            called: the registration of the parametrization that is called. None: check all weights.
        """
        if self._was_sharded or (called is not None and called.buffer_replaced):
            return
        if called is None or called in self._called or not self._called:
            self._called.clear()
            checked = [*self.registrations.values()]
        else:
            checked = [called]
        if called is not None:
            self._called.add(called)
        if any(each.changed(or_replaced=called is None) for each in checked):
            self.refresh_if_possible()
        elif any(each.buffer_overwritten and concrete(each.reader.threshold) for each in checked):
            self._write_thresholds()

    @eager
    def refresh_if_possible(self) -> None:
        """Refresh if all weights have values and this is no backward pass."""
        if torch._C._current_graph_task_id() != -1 or self._was_sharded or not self.registrations:
            return
        if all(isinstance(each, nn.Parameter) and concrete(each) and not each.is_meta for each in self.originals):
            self.refresh()

    def masks(self) -> dict[str, Tensor]:
        """Return the mask of each weight, by the current thresholds: bool tensors, True where an element is kept."""
        if self.frozen:
            every = self.registrations.values()
            return {each.name: each.reader.mask for each in every if each.reader.mask is not None}
        return self.config.pattern.masks(self.weights(), self.position.groups)

    def exact_masks(self) -> dict[str, Tensor]:
        """Return the masks that a bake would use. Refresh only where the number of zeros would not be exact."""
        if not (self.frozen or self.sharded or self.source):  # a copy that has changed has another number of zeros
            self.require_values()
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
        return self.config.pattern.count_zeros(self.weights(), self.position.groups)

    def survivors(self) -> dict[str, Tensor]:
        """Return the number of survivors of each weight, by name: int64, 0-dim, on the weight's device.

        It does not wait for a GPU. The weights must not be frozen or sharded.
        """
        thresholds = self.position.thresholds
        pattern = self.config.pattern
        return {name: pattern.survivors(weight, thresholds[name]) for name, weight in self.weights().items()}

    def set_masks(self, fixed: Mapping[str, Tensor] | None) -> None:
        """Use fixed masks in the forward pass, given by the name of the weight. None: use the thresholds."""
        for each in self.registrations.values():
            each.reader.mask = None if fixed is None else fixed[each.name]

    @property
    def _masks_are_missing(self) -> bool:
        return any(each.reader.mask is None for each in self.registrations.values())

    def _find_masks(self, zeros: int) -> None:
        """Find the masks of a frozen model from its zeros."""
        self.require_values()
        # Inference tensors could not be part of a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            self.set_masks(masks_of_frozen(self.weights(), zeros, self.config.pattern, self._allocate))
            self.position.zeros = zeros
            if any(group.threshold.is_meta for group in self.position.groups):  # the weights had no values
                self.position.groups = self._allocate(self.weights(), zeros)
                self._write_thresholds()

    def _allocate(self, weights: Mapping[str, Tensor], zeros: int) -> list[Group]:
        config = self.config
        return config.pattern.allocate(config.allocation, weights, zeros, self.budget.guards)

    def _compute_thresholds(self, zeros: int) -> None:
        if self.complete:  # else the thresholds are those of the source
            self.position.groups = self._allocate(without_values_if_one_is(self.weights()), zeros)
        self.position.zeros = zeros
        self._write_thresholds()
        self._was_sharded = self.sharded
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
                key = id(threshold := thresholds[each.name]), like.dtype
                if key not in rounded:
                    rounded[key] = rounded_down(threshold, like.dtype)
                value = rounded[key]
                if value.is_meta and not like.is_meta:  # another weight has no values, so there is no threshold yet
                    value = torch.zeros_like(value, device=like.device)
                values.append(value)
                if old.dtype != value.dtype or old.device != like.device or old.is_inference() or each.buffer_replaced:
                    each.reader.threshold = torch.empty_like(value, device=like.device)
                elif self.source is not None and old.data_ptr() != each.memory:
                    # A moving average may assign the model's buffers through `.data`, and then shares their memory.
                    old.data = torch.empty_like(value, device=like.device)
            buffers = [each.reader.threshold for each in self.registrations.values()]
            torch._foreach_copy_(buffers, values)  # pyright: ignore[reportPrivateImportUsage]
        for each in self.registrations.values():
            each.note_written()
            each.memory = None if self.source is None else each.reader.threshold.data_ptr()

    # -- the position in the model's state_dict ---------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """Return the position as a tensor, with what a bake needs besides; see Note [Saved position]."""
        now = self.position_now()
        groups = self.position.groups if now is self.position or self.source is None else self.source.position.groups
        known = self.config.pattern.size * sum(group.zeros for group in groups) == now.zeros
        stacked = [each.name for each in self.registrations.values() if each.stacked]
        settings = BakeSettings.of(self.config, self.aliases, tuple(dict.fromkeys(stacked)))
        return pack(now, self.final_zeros, settings, groups if known else None)

    def set_extra_state(self, state: Any) -> None:
        """Note a saved position. The model moves there when all its weights have been loaded."""
        self._loading = unpack_position(state, self.budget.total, f"*{POSITION}"), set(self.registrations)

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
                position = self.position  # changed in place, since copies refer to it
                position.zeros, position.step, position.frozen_step = loaded.zeros, loaded.step, loaded.frozen_step
                self._loading = None
                self.write_theta()
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

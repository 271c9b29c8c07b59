"""The controller: it moves a sparsified model through its schedule."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from feather_param.core.attach import attach, detach, links, require_attached
from feather_param.core.baking import bake
from feather_param.core.config import Config
from feather_param.core.controller_state import position_in, saved
from feather_param.core.freezing import freeze, restore_zeros
from feather_param.core.movement import Movement
from feather_param.core.optimizer import Follower, checked_optimizer
from feather_param.core.shared import SharedSparsity
from feather_param.core.starvation import Starvation
from feather_param.core.warnings import warn_of_dead, warn_of_early, warn_of_late_step
from feather_param.ops.finite import LateNaN
from feather_param.ops.tracing import eager
from feather_param.parametrizations import states_of
from feather_param.reports.report import Report, rows
from feather_param.selection.select import Selection
from feather_param.utils.text import name_of


class Controller:
    """The sparsity of a model during training. Made by `sparsify`; call `step` after each optimizer step.

    The position in the schedule is part of the model's ``state_dict``. A model that loads an earlier state goes back to
    the step at which it was saved.
    """

    def __init__(self, model: nn.Module, config: Config, selection: Selection) -> None:
        self._model = model
        self._skipped = selection.skipped
        self._shared = SharedSparsity(config, config.budget(selection.sizes))
        self._shapes = {weight.name: list(weight.places[0].value().shape) for weight in selection.weights}
        self._follower: Follower | None = None
        self._late_nan = LateNaN()
        self._movement = Movement()
        self._warned_after_desparsify = False
        self._starvation = Starvation()
        attach(model, self._shared, selection.weights)
        try:
            self._shared.move_to(0)
        except BaseException:
            detach(self._shared)
            raise
        self._links = links(model, self._shared)

    @property
    def model(self) -> nn.Module:
        """The model that `sparsify` got."""
        return self._model

    @property
    def step_count(self) -> int:
        """Number of optimizer steps seen."""
        return self._shared.position.step

    @property
    def rate(self) -> float:
        """The scheduled rate at the current step, a fraction of all prunable weights."""
        position = self._shared.position
        return self._shared.config.rate(position.step if position.frozen_step is None else position.frozen_step)

    @property
    def threshold(self) -> Tensor:
        """The current threshold: a 0-dim tensor, float64 if a weight is, else float32.

        It is the largest one if weights have different thresholds: by the allocation, or because a weight is at its
        guard (``max_rate_per_layer``, ``min_nonzero_per_layer``). The threshold of a frozen model does not change.

        Raises:
            RuntimeError: a weight has no values (meta device).
        """
        if not self._shared.frozen:
            self._shared.require_values()
        self._shared.refresh_if_changed()
        return self._shared.position.largest_threshold.detach().clone()

    @eager
    def step(self) -> None:
        """Advance the schedule by one optimizer step and compute the thresholds from the new weights.

        Raises:
            RuntimeError: the model has been desparsified, a layer of it was replaced, or the controller follows an
                optimizer, which advances it already.
            ValueError: a weight holds NaN or infinity, or tied weights are no longer tied. The controller has not
                advanced. On a GPU, no step waits for the device, so NaN is found one or two steps later, unless there
                are guards, the weights are sharded, or the allocation is `lamp` or `normalised`.
        """
        self._require("step()")
        if self._follower is not None:
            raise RuntimeError(
                "expected step() not to be called: sparsify got optimizer= (or follow() was called), and each step of "
                "that optimizer already advances this controller; drop one of the two"
            )
        self._advance()

    def refresh(self) -> None:
        """Compute the thresholds again from the current weights, without advancing the schedule.

        Reports and `desparsify` do this by themselves. A forward pass does it if the weights were loaded, swapped or
        scaled. Call this before an evaluation where a write to the weights cannot be noticed: under FSDP2 (on all
        processes), in compiled models, and after writes through ``.data`` without a call of ``train()`` or ``eval()``.

        Raises:
            RuntimeError: the model has been desparsified, a layer of it was replaced, or a weight has no values (meta
                device).
            ValueError: a weight holds NaN or infinity.

        Example:
            >>> model = nn.Linear(4, 4)
            >>> controller = feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0)
            >>> model.parametrizations.weight.original.data.mul_(2.0)  # doctest: +ELLIPSIS
            tensor(...)
            >>> controller.refresh()
            >>> int((model.weight == 0).sum())
            8
        """
        self._require("refresh()")
        self._shared.refresh()
        if self._shared.frozen:
            restore_zeros(self._shared)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Advance the controller at each step of an optimizer, as ``optimizer=`` of `sparsify` does.

        Call this if the optimizer is built after `sparsify`. FSDP2 needs this order: `sparsify`, ``fully_shard``, the
        optimizer, `follow`. If several optimizers train the model, follow the one that steps last. A second call
        replaces the first. A deepcopy of the controller follows no optimizer.

        The optimizer then warns if it steps the model after `desparsify`, since this would bring pruned weights back.
        It also saves the names of its parameters in its ``state_dict``, as the entry ``"feather_param"``. A state that
        was saved before `sparsify` and is loaded after it, or the reverse, is sorted by these names. A state without
        names is refused.

        Args:
            optimizer: an optimizer that holds weights of this model. Of a wrapper (accelerate's, Lookahead), the
                optimizer inside is followed.

        Raises:
            TypeError: it is no ``torch.optim.Optimizer``, or a wrapper in which no optimizer is found.
            ValueError: it holds none of the weights.
            RuntimeError: the model has been desparsified.

        Example:
            >>> model = nn.Linear(4, 4)
            >>> controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # after fully_shard(model)
            >>> controller.follow(optimizer)
            >>> model(torch.ones(1, 4)).sum().backward()
            >>> optimizer.step()
            >>> controller.step_count
            1
        """
        self._require("follow()")
        weights = {each.name: each.originals for each in self._shared.registrations.values()}
        self._follow(checked_optimizer(optimizer, weights))

    def freeze(self) -> None:
        """Fix the masks: the schedule stops, and the zeros stay where they are while training continues.

        The dense weights are overwritten with the pruned ones, so the network does not change. From then on, pruned
        weights get no gradient, and momentum and weight decay cannot change them. The masks take one byte for each
        element, and no entry in the ``state_dict``: its weights hold the zeros. Copies made before are not frozen.

        Loading a state that was saved before the freeze, of the model or of the controller, ends it. Loading a plain
        model's state_dict keeps the masks. Warns if there are no zeros yet.

        Raises:
            RuntimeError: the model has been desparsified, or a weight has no values.
            ValueError: a weight is sharded over processes, holds NaN or infinity, or shares memory with another one.

        Example:
            >>> model = nn.Linear(4, 4)
            >>> controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, end_step=2)
            >>> for step in range(4):
            ...     if step == 2:
            ...         controller.freeze()
            ...     controller.step()  # after optimizer.step()
            >>> controller.report().zeros
            8
        """
        self._require("freeze()")
        if not self._shared.frozen:
            if not self._shared.position.zeros:
                warn_of_early("freeze()", 0, self._shared.final_zeros)
            freeze(self._without_source())

    def report(self) -> Report:
        """Return the zeros of each weight and of all, as `desparsify` would leave them now.

        Warns of weights with no survivors, and of layers that starve if no step has warned of them. If the weights are
        sharded, call this on all processes.

        Raises:
            RuntimeError: the model has been desparsified, a layer of it was replaced, or a weight has no values.
            ValueError: a weight holds NaN or infinity.
        """
        self._require("report()")
        self._shared.refresh_checked()
        weights, counts = self._shared.weights(), self._shared.counts()
        warn_of_dead(weights, counts, self._shared.config)
        found = Report(
            rows(weights, counts, outputs := self._shared.outputs()),
            dict(self._skipped),
            str(self._shared.config.pattern),
            name_of(self._shared.config.allocation),
        )
        self._starvation.warn({row.name: row.survivors for row in found.rows}, outputs, self._shared.config)
        return found

    def masks(self) -> dict[str, Tensor]:
        """Return the mask of each weight by name, as `desparsify` would use it now.

        Returns:
            Bool tensors of the weights' shapes; True where an element is kept.

        Raises:
            RuntimeError: the model has been desparsified, a layer of it was replaced, or a weight has no values.
            ValueError: a weight holds NaN, or holds infinity and the thresholds must be computed.

        Example:
            >>> layer = nn.Linear(2, 2)
            >>> layer.weight = nn.Parameter(torch.tensor([[1.0, -2.0], [-4.0, 3.0]]))
            >>> feather_param.sparsify(layer, final_rate=0.5, total_steps=1, end_step=0).masks()["weight"]
            tensor([[False, False],
                    [ True,  True]])
        """
        self._require("masks()")
        return self._shared.exact_masks()

    def state_dict(self) -> dict[str, Any]:
        """Return the settings and the position as plain Python values, which ``weights_only=True`` loads."""
        return saved(self._shared.config, self._shapes, self._shared.position)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from the state of a controller of the same model with the same settings.

        The model's own state_dict holds the position as well. This method also checks that the settings are the same.
        The model may be loaded before or after this call. The masks of a frozen model are found from its zeros.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            ValueError: the state has another version or other settings, or is of another model. The controller is
                untouched.
            RuntimeError: the model has been desparsified, or the state is frozen and a weight has no values.
        """
        self._require("load_state_dict()")
        position = position_in(state_dict, self._shared.config, self._shapes)
        self._without_source().move_to(*position)
        self._late_nan = LateNaN()

    def desparsify(self) -> None:
        """Write the exact zeros into the model and make its layers plain again; see `feather_param.desparsify`."""
        if self._shared not in states_of(self._model):
            self._require("desparsify()")
        bake(self._model)

    def detach(self) -> None:
        """Make the layers plain again with their dense weights, without zeros: undo `sparsify`.

        An optimizer that the controller follows is no longer followed. Its state stays valid, since the Parameters are
        the same. A frozen model keeps its zeros, which `freeze` wrote into the dense weights.

        Raises:
            RuntimeError: the model has been desparsified.

        Example:
            >>> layer = nn.Linear(4, 4)
            >>> feather_param.sparsify(layer, final_rate=0.5, total_steps=1, end_step=0).detach()
            >>> int((layer.weight == 0).sum())
            0
        """
        self._require("detach()")
        if self._follower is not None:
            self._follower.detach()
            self._follower = None
        detach(self._shared)

    def _without_source(self) -> SharedSparsity:
        """Return the shared state, so that this controller can change it. A copy stops following its source."""
        self._shared.source = None
        return self._shared

    def _follow(self, optimizer: torch.optim.Optimizer) -> None:
        self._without_source()
        if self._follower is not None:
            self._follower.detach()
        self._follower = Follower(optimizer, self._model, self._after_step, lambda: bool(self._shared.registrations))

    def _after_step(self) -> None:
        if self._shared.registrations:
            self._require("step()")
            self._advance()
        elif not self._warned_after_desparsify and not states_of(self._model):
            self._warned_after_desparsify = True
            warn_of_late_step()

    def _advance(self) -> None:
        shared = self._without_source()
        self._late_nan.refuse(shared.weights)
        self._movement.check(shared)
        if shared.frozen:
            threshold = restore_zeros(shared)
            shared.position.step += 1
        else:
            shared.move_to(shared.position.step + 1)
            threshold = shared.position.largest_threshold
        self._late_nan.watch(threshold, sharded=shared.sharded)
        self._starvation.check(shared)

    def _require(self, call: str) -> None:
        self._links = require_attached(call, self._model, self._shared, self._links)

    def __deepcopy__(self, memo: dict[int, Any]) -> Controller:
        twin = Controller.__new__(Controller)
        memo[id(self)] = twin
        not_copied = {"_follower": None, "_late_nan": LateNaN()}  # they belong to this one's optimizer and GPU
        own = {name: value for name, value in vars(self).items() if name not in not_copied}
        vars(twin).update(copy.deepcopy(own, memo), **not_copied)
        if twin._shared.source is not None:
            twin._shared.source.controlled = True
        return twin

    def __repr__(self) -> str:
        config, budget = self._shared.config, self._shared.budget
        rate = f"rate={self.rate:.4f} of {config.final_rate}"
        frozen = ", frozen" if self._shared.frozen else ""
        return f"Controller({rate}, step {self.step_count} of {config.total_steps}, {budget.total:,} weights{frozen})"

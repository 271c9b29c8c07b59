"""The controller: the only one that moves the sparsity of a model from step to step."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from feather_param.core.attach import attach, detach, links, require_attached
from feather_param.core.baking import bake
from feather_param.core.config import Config
from feather_param.core.freezing import freeze, hold
from feather_param.core.optimizer import Follower, Movement, checked_optimizer
from feather_param.ops.finite import LateNaN
from feather_param.ops.tracing import eager
from feather_param.parametrizations import SharedSparsity, states_of
from feather_param.reports.report import Report, rows, warn_of_dead
from feather_param.selection.select import Selection
from feather_param.utils.checks import integer, require_same_shapes
from feather_param.utils.warn import warn, warn_of_early

_VERSION = 1  # of a saved state


class Controller:
    """The sparsity of one model over time. Made by `sparsify`; call `step` after each optimizer step.

    Its position in the schedule is part of the model's ``state_dict``: a model that loads an older state, of whatever
    tool, goes back to the step at which it was saved.
    """

    def __init__(self, model: nn.Module, config: Config, selection: Selection) -> None:
        self._model = model
        self._skipped = selection.skipped
        self._shared = SharedSparsity(config, config.budget(selection.sizes))
        self._shapes = {weight.name: list(weight.sites[0].dense().shape) for weight in selection.weights}
        self._follower: Follower | None = None
        self._late_nan = LateNaN()
        self._movement = Movement()
        self._warned = False
        self._counted = 0  # zeros at which dead weights were looked for
        attach(model, self._shared, selection.weights)
        try:
            self._shared.move(0)
        except BaseException:
            detach(self._shared)
            raise
        self._links = links(model, self._shared)

    @property
    def step_count(self) -> int:
        """Number of optimizer steps seen."""
        return self._shared.position.step

    @property
    def rate(self) -> float:
        """The scheduled rate at the current step, a fraction of all prunable weights; ``final_rate`` at the end."""
        position = self._shared.position
        return self._shared.config.rate(position.step if position.frozen_step is None else position.frozen_step)

    @property
    def threshold(self) -> Tensor:
        """The current threshold: a 0-dim tensor, float64 if a weight is, else float32.

        Weights at their guard (``max_rate_per_layer``, ``min_nonzero_per_layer``) have smaller ones. Once frozen, it
        stays as it was.
        """
        self._shared.refresh_if_changed()
        first, *others = (group.threshold for group in self._shared.position.groups if group.names)
        return reduce(torch.maximum, (threshold.to(first.device) for threshold in others), first).detach().clone()

    @eager
    def step(self) -> None:
        """Note that one optimizer step has been made: advance the schedule, and refresh the threshold.

        Raises:
            RuntimeError: the model has been desparsified, a layer of it was replaced, or the controller follows an
                optimizer, whose steps count.
            ValueError: a weight holds NaN or infinity, or tied weights no longer are; the controller has not advanced.
                On a GPU, NaN is noticed a step or two late, for no step waits for the device, unless there are guards
                or the weights are sharded.
        """
        self._require("step()")
        if self._follower is not None:
            raise RuntimeError(
                "expected step() not to be called: sparsify got optimizer= (or follow() was called), and each step of "
                "that optimizer already advances this controller; drop one of the two"
            )
        self._advance()

    def refresh(self) -> None:
        """Take the thresholds anew, from the weights as they are now; the schedule stands.

        Reports and `desparsify` take them anew by themselves, and so does a forward pass if weights were loaded,
        swapped or scaled since. Call this before an evaluation where nothing tells of a write: under FSDP2 (in all
        processes), in compiled models, after writes past torch, or through ``.data`` without ``train()`` or ``eval()``.

        Raises:
            RuntimeError: the model has been desparsified, or a layer of it was replaced.
            ValueError: a weight holds NaN or infinity, or no values (on the meta device).

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
            hold(self._shared)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Let each step of an optimizer make this controller's, as ``optimizer=`` of `sparsify` does.

        Call this where the optimizer is built later, as FSDP2 asks: `sparsify`, ``fully_shard``, the optimizer, then
        this. Of several optimizers, give the one that steps last: the threshold is taken from the weights as they are
        then. Another call moves over to another one. A deepcopy of the controller follows none.

        A followed optimizer warns if it steps the model after `desparsify`, which brings pruned weights back to life.
        It saves the names of its parameters in its ``state_dict`` (under ``"feather_param"``), by which a state saved
        on the other side of `sparsify` is brought into its order; it refuses a state without names.

        Args:
            optimizer: it trains weights of this model. Of a wrapper (accelerate's, Lookahead), the one inside is
                followed.

        Raises:
            TypeError: it is no ``torch.optim.Optimizer``, or a wrapper that does not show what it wraps.
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
        self._follow(checked_optimizer(optimizer, {p.name: p.originals for p in self._shared.places.values()}))

    def _lead(self) -> SharedSparsity:
        """Return the shared state, to move it: a copy that its own controller moves follows no other model."""
        self._shared.source = None
        return self._shared

    def _follow(self, optimizer: torch.optim.Optimizer) -> None:
        self._lead()
        if self._follower is not None:
            self._follower.detach()
        self._follower = Follower(optimizer, self._model, self._after_step, lambda: bool(self._shared.places))

    def _after_step(self) -> None:
        if self._shared.places:
            self._require("step()")
            self._advance()
        elif not self._warned and not states_of(self._model):
            self._warned = True
            warn(
                "this optimizer has just stepped a model that was desparsified: momentum and weight decay bring "
                "pruned weights back to life, so its zeros are lost; build a new optimizer and sparsify again, "
                "or stop training before desparsify"
            )

    def _advance(self) -> None:
        shared = self._lead()
        self._late_nan.refuse(shared.weights)
        self._movement.look(shared)
        zeros, before = shared.position.zeros, shared.position.groups[0].threshold
        if shared.frozen:
            threshold = hold(shared)
            shared.position.step += 1
        else:
            shared.move(shared.position.step + 1)
            threshold = shared.position.groups[0].threshold
        self._late_nan.look(threshold, sharded=shared.sharded)
        if threshold.device.type == "cpu" and not shared.frozen:
            # The rate is final now, or many weights equal the threshold, which does not grow with the zeros.
            now = shared.position.zeros
            tied = zeros < now and bool(threshold) and torch.equal(threshold, before)
            if self.step_count == shared.config.end_step or (tied and now - self._counted >= shared.aim // 16):
                self._counted = shared.budget.total if self._report().dead else now

    def freeze(self) -> None:
        """Fix the masks while training goes on: the schedule stops, and the zeros stay where they are.

        The dense weights are overwritten by what the forward pass sees, so that the network stays the same; from then
        on pruned weights get no gradient, and neither momentum nor weight decay brings them back. The masks take
        one byte a weight, and no entry in the ``state_dict``, whose weights have the zeros. A copy made before goes on
        by magnitude. Loading a state from before, of the model or the controller, thaws the model; a plain model's
        state keeps the masks. Warns where there are no zeros yet.

        Raises:
            RuntimeError: the model has been desparsified.
            ValueError: the weights are sharded over processes, or hold NaN, infinity or no values.

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
                warn_of_early("freeze()", 0, self._shared.aim)
            freeze(self._lead())

    def report(self) -> Report:
        """Report what `desparsify` would leave at this moment, per weight and in all.

        Warns of weights of which nothing survives. Where the weights are sharded, all processes call this.

        Raises:
            RuntimeError: the model has been desparsified, or a layer of it was replaced.
            ValueError: a weight holds NaN, infinity or no values.
        """
        self._require("report()")
        self._shared.settle()
        return self._report()

    def _report(self) -> Report:
        report = Report(rows(self._shared.weights(), self._shared.counts()), dict(self._skipped))
        warn_of_dead(report)
        return report

    def masks(self) -> dict[str, Tensor]:
        """Return which elements of each weight `desparsify` would leave at this moment: bool tensors, by name.

        Raises:
            RuntimeError: the model has been desparsified, or a layer of it was replaced.
            ValueError: a weight holds NaN or no values, or infinity where the thresholds have to be taken anew.

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
        """Return settings and position, in plain Python values; loads with ``weights_only=True``."""
        position = self._shared.position
        return {
            "version": _VERSION,
            **self._shared.config.plain,
            "weights": self._shapes,
            "step_count": position.step,
            "frozen_step": position.frozen_step,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where a controller of the same model and the same settings was saved.

        The model's own state_dict holds the position, too: this checks besides that the settings are the same. The
        model may be loaded before or after; the zeros of a frozen model's weights tell its masks.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            ValueError: it is from another version, model or setting; the controller is then untouched.
            RuntimeError: the model has been desparsified.
        """
        self._require("load_state_dict()")
        if not isinstance(state_dict, Mapping) or not {"version", "step_count", "frozen_step"} <= state_dict.keys():
            raise ValueError("expected the state_dict of a feather_param Controller, got something else")
        if state_dict["version"] != _VERSION:
            raise ValueError(
                f"expected a controller state of version {_VERSION}, got {state_dict['version']}; "
                "load it with the feather_param release that wrote it"
            )
        self._shared.config.require_same(state_dict)
        require_same_shapes("a controller state", self._shapes, state_dict.get("weights"))
        step, frozen = integer("step_count", state_dict["step_count"], 0), state_dict["frozen_step"]
        self._lead().move(step, None if frozen is None else integer("frozen_step", frozen, 0))
        self._late_nan = LateNaN()

    def desparsify(self) -> None:
        """Bake exact zeros into the model's weights and give it back its plain layers; see `desparsify`."""
        if self._shared not in states_of(self._model):
            self._require("desparsify()")
        bake(self._model)

    def _require(self, call: str) -> None:
        require_attached(call, self._model, self._shared, self._links)

    def __deepcopy__(self, memo: dict[int, Any]) -> Controller:
        twin = Controller.__new__(Controller)
        memo[id(self)] = twin
        here = {"_follower": None, "_late_nan": LateNaN()}  # of this one's optimizer and GPU
        own = {name: value for name, value in vars(self).items() if name not in here}
        vars(twin).update(copy.deepcopy(own, memo), **here)
        twin._shared.controlled = True
        return twin

    def __repr__(self) -> str:
        config, budget = self._shared.config, self._shared.budget
        rate = f"rate={self.rate:.4f} of {config.final_rate}"
        frozen = ", frozen" if self._shared.frozen else ""
        return f"Controller({rate}, step {self.step_count} of {config.total_steps}, {budget.total:,} weights{frozen})"

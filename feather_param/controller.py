"""The one object with state: it moves the threshold of a model's weights from step to step."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from feather_param import checks, settings
from feather_param.allocation import Budget, allocate, count_zeros
from feather_param.baking import bake, freeze, hold, remove, survivors
from feather_param.checkpoints import accept_dense
from feather_param.groups import SharedThreshold
from feather_param.late_nan import LateNaN
from feather_param.optimizers import check_optimizer, follow
from feather_param.parametrizations import FeatherParametrization
from feather_param.recurrent import drop_weights_after_forward
from feather_param.report import Report, rows
from feather_param.schedules import Schedule
from feather_param.selection import Selection, require_tied, sparsified
from feather_param.shards import held_here, is_sharded
from feather_param.thresholds import PruneCount, kth_magnitude
from feather_param.warning import warn, warn_of_dead, warn_of_early

__all__ = ["Controller"]


class Controller:
    """The sparsity of one model over time. Made by `sparsify`; call `step` after each optimizer step.

    Attributes:
        threshold: the current threshold, a 0-dim float32 tensor.
        rate: the scheduled rate at the current step, a fraction of all prunable weights.
        step_count: number of optimizer steps seen.
    """

    def __init__(
        self,
        model: nn.Module,
        selection: Selection,
        budget: Budget,
        *,
        final_rate: float,
        total_steps: int,
        start_step: int,
        end_step: int,
        schedule: Schedule,
        p: float,
        theta: float | checks.Theta,
    ) -> None:
        self.step_count = 0
        self._frozen_step: int | None = None
        self._schedule = schedule
        self._span = (start_step, end_step)
        self._skipped = selection.skipped
        self._model = model
        self._optimizer: torch.optim.Optimizer | None = None
        self._hooks: tuple[RemovableHandle, ...] = ()  # those that we gave it
        self._warned = False
        self._weights = selection.weights
        self._budget = budget
        weights = self._dense()
        self._settings = settings.describe(
            weights,
            budget,
            final_rate=final_rate,
            total_steps=total_steps,
            start_step=start_step,
            end_step=end_step,
            schedule=schedule,
            p=p,
            theta=theta,
        )
        self._late_nan = LateNaN()
        pruned = self._target()
        shares = allocate(weights, pruned, budget.caps)  # raises while the model is untouched
        self._shared = SharedThreshold(budget.total, next(iter(weights.values())).device, budget.caps)
        self._shared.aim = budget.zeros(final_rate)
        self._theta = theta if callable(theta) else None
        try:
            self._register(p, None if callable(theta) else theta)
        except BaseException:  # of a module that takes no parametrization: leave the others as they were
            remove([site for weight in self._weights for site in weight.sites if site.feather is not None])
            raise
        self._shared.take(shares, pruned)
        if callable(theta):
            self._shared.scale_gradient(checks.slope_at(theta, self.rate))

    def _register(self, p: float, theta: float | None) -> None:
        orders = {site.module: tuple(site.module._parameters) for weight in self._weights for site in weight.sites}
        owner = True
        for weight in self._weights:
            first: FeatherParametrization | None = None
            for site in weight.sites:
                feather = FeatherParametrization(
                    self._shared, owner=owner, p=p, theta=theta, parameter_order=orders[site.module]
                )
                owner = False
                # unsafe: the check would run the operator, and our shapes and dtypes are right by construction.
                parametrize.register_parametrization(site.module, site.tensor, feather, unsafe=True)
                site.module.parametrizations.train(site.module.training)  # type: ignore[union-attr, operator]
                accept_dense(site.module)
                drop_weights_after_forward(site.module)
                if first is None:
                    first = feather
                    feather.join(weight.name, site.parametrizations)
                else:
                    feather.tie(first)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Let each step of an optimizer make this controller's, so that `step` need not be called.

        `sparsify` does so with its ``optimizer=``; call this where the optimizer is built after `sparsify`, as
        FSDP2 asks: `sparsify`, ``fully_shard``, the optimizer, then this. A followed optimizer also

        * warns if it steps the model after `desparsify`, which brings pruned weights back to life; where you call
          `step` yourself, `step` raises then, but nobody watches an optimizer alone;
        * saves the names of its parameters in its ``state_dict`` (under ``"feather_param"``), by which a state saved
          on the other side of `sparsify` is brought into this optimizer's order. A state without names is sorted by
          shapes, and refused with a ValueError where these do not tell the order.

        Of several optimizers, give the one that steps last: the threshold is taken from the weights as they are then.
        Another call moves over to another optimizer; one more with the same changes nothing. A deepcopy of the
        controller follows no optimizer, since a deepcopy of the optimizer has no hooks: call `step`, or this.
        ``torch.distributed.checkpoint`` makes the state of an optimizer that has none by a step with a rate of 0,
        which counts: load the controller's state after the optimizer's.

        Args:
            optimizer: it trains the weights of this model, sharded or not.

        Raises:
            TypeError: it is no ``torch.optim.Optimizer``.
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
        self._require_active("follow()")
        check_optimizer(optimizer, self._weights)
        self._attach(optimizer)

    def _attach(self, optimizer: torch.optim.Optimizer) -> None:
        # A hook cannot remove itself while torch goes through them, so the next controller removes those of the last.
        for hook in list(getattr(optimizer, "_optimizer_step_post_hooks", {}).values()):
            other = getattr(hook, "__self__", None)
            if isinstance(other, Controller) and not other._active:
                other._detach()
        self._detach()
        self._optimizer = optimizer
        self._hooks = follow(optimizer, self._model, self._after_step)

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._optimizer, self._hooks = None, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Controller:
        twin = Controller.__new__(Controller)
        memo[id(self)] = twin
        here = {"_optimizer": None, "_hooks": (), "_late_nan": LateNaN()}  # of this one's optimizer and GPU
        own = {name: value for name, value in vars(self).items() if name not in here}
        vars(twin).update(copy.deepcopy(own, memo), **here)
        return twin

    def _after_step(self, *_: Any) -> None:
        if self._active:
            self._advance()
        elif not self._warned and not any(site.feather for weight in self._weights for site in weight.sites):
            self._warned = True
            warn(
                "this optimizer has just stepped a model that was desparsified: momentum and weight decay bring "
                "pruned weights back to life, so its zeros are lost; build a new optimizer and sparsify again, "
                "or stop training before desparsify"
            )

    @property
    def threshold(self) -> Tensor:
        if self._shared.stale:
            self._shared.catch_up()
        return self._shared.threshold.detach().clone()

    @property
    def rate(self) -> float:
        start, end = self._span
        step = self.step_count if self._frozen_step is None else self._frozen_step
        if step < start:
            return 0.0
        if step >= end:
            return self._settings["final_rate"]
        return self._settings["final_rate"] * checks.fraction(self._schedule, (step - start) / (end - start))

    def step(self) -> None:
        """Note that one optimizer step has been made: advance the schedule, refresh the threshold.

        Past ``total_steps`` the rate stays at ``final_rate``.

        Raises:
            RuntimeError: the model has been desparsified, or the controller follows an optimizer, whose steps count.
            ValueError: a weight holds NaN or infinity (named in the message), or tied weights no longer are; the
                controller has not advanced. On a GPU the first is noticed one or two steps late, because no step
                waits for the device, unless there are guards or the weights are sharded.
        """
        self._require_active("step()")
        if self._optimizer is not None:
            raise RuntimeError(
                "expected step() not to be called: sparsify got optimizer= (or follow() was called), and each step of "
                "that optimizer already advances this controller; drop one of the two"
            )
        self._advance()

    def _advance(self) -> None:
        self._require_active("step()")
        require_tied([weight for weight in self._weights if len(weight.sites) > 1])
        self.step_count += 1
        try:
            self._refresh()
        except BaseException:  # of a schedule, too
            self.step_count -= 1
            raise
        if self.step_count == self._span[1] and self.threshold.device.type == "cpu" and not self._shared.frozen:
            self.report()  # the rate is final now: warn of layers that died

    def _refresh(self) -> None:
        weights = self._dense()
        self._late_nan.refuse(weights)
        if self._shared.frozen:
            parts, add_up = held_here(weights)
            threshold = kth_magnitude(parts, 0, add_up)  # zero; or, where a weight is not finite, an error or NaN
            hold(self._weights)
        else:
            self._move(weights)
            threshold = self._shared.threshold
        self._late_nan.look(threshold, sharded=any(map(is_sharded, weights.values())))

    def _move(self, weights: Mapping[str, Tensor]) -> None:
        """Set threshold and theta for the step that has come; on an error neither."""
        theta = None if self._theta is None else checks.slope_at(self._theta, self.rate)
        self._shared.refresh(self._target(), weights)
        if theta is not None:
            self._shared.scale_gradient(theta)

    def freeze(self) -> None:
        """Hold the zeros as they are now while training goes on: the schedule stops, and a mask stands for magnitudes.

        The dense weights are overwritten by what the forward pass sees, so that the network stays the same; from then
        on pruned weights get no gradient, and neither momentum nor weight decay brings them back. The masks take
        one byte a weight, and no place in the ``state_dict``, whose weights have the zeros. A copy made before goes on
        by magnitude. Loading an unfrozen checkpoint keeps the masks, until the state of its controller is loaded too.
        Warns where there are no zeros yet.

        Raises:
            RuntimeError: the model has been desparsified.
            ValueError: the weights are sharded over processes, or hold NaN or infinity.

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
        self._require_active("freeze()")
        if not self._shared.frozen:
            if not self._target():
                warn_of_early("freeze()", 0, self._shared.aim)
            freeze(self._weights)
            self._frozen_step = self.step_count

    def report(self) -> Report:
        """Report what `desparsify` would leave at this moment, per weight and in all.

        Warns of weights of which nothing survives.

        Raises:
            RuntimeError: the model has been desparsified.
        """
        self._require_active("report()")
        weights = self._dense()
        if self._shared.frozen:
            counts = {name: PruneCount(int((~mask).sum()), 0) for name, mask in self._shared.masks().items()}
        else:
            counts = count_zeros(weights, allocate(weights, int(self._shared.pruned), self._budget.caps))
        report = Report(rows(weights, counts), dict(self._skipped))
        warn_of_dead(report.dead)
        return report

    def survivors(self) -> dict[str, Tensor]:
        """Return which elements of each weight `desparsify` would leave at this moment: bool tensors, by name.

        Raises:
            RuntimeError: the model has been desparsified.
            ValueError: a weight holds NaN or infinity.

        Example:
            >>> layer = nn.Linear(2, 2)
            >>> layer.weight = nn.Parameter(torch.tensor([[1.0, -2.0], [-4.0, 3.0]]))
            >>> feather_param.sparsify(layer, final_rate=0.5, total_steps=1, end_step=0).survivors()["weight"]
            tensor([[False, False],
                    [ True,  True]])
        """
        self._require_active("survivors()")
        return survivors(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume, in plain Python values; loads with ``weights_only=True``."""
        return {**self._settings, "step_count": self.step_count, "frozen_step": self._frozen_step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where a controller of the same model and the same settings was saved.

        Load the model's state_dict as well, before or after: the threshold travels there, and the zeros of a frozen
        model's weights, which tell its masks.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            ValueError: it is from another version, model or setting; the controller is then untouched.
            RuntimeError: the model has been desparsified.
        """
        self._require_active("load_state_dict()")
        settings.require_same(self._settings, state_dict)
        step_count = checks.integer("step_count", state_dict["step_count"], 0)
        frozen_step = state_dict["frozen_step"]
        if frozen_step is not None:
            frozen_step = checks.integer("frozen_step", frozen_step, 0)
        before = self.step_count, self._frozen_step
        self.step_count, self._frozen_step = step_count, frozen_step
        if frozen_step is not None and self._shared.frozen:  # the masks are there already
            return
        try:
            if frozen_step is not None and self._shared.rests:  # the model was loaded before
                for member in self._shared.members.values():
                    member.find_mask()
            else:
                self._move(self._dense())
                if frozen_step is not None:
                    freeze(self._weights)  # until the model is loaded
        except BaseException:
            self.step_count, self._frozen_step = before
            raise
        if frozen_step is None:
            for member in self._shared.members.values():
                member.mask = None
        self._late_nan = LateNaN()

    def desparsify(self) -> None:
        """Bake exact zeros into the model's weights and give it back its plain layers; see `desparsify`."""
        self._require_active("desparsify()")
        bake(sparsified(self._model))  # not `self._weights`: they may belong to a layer that was replaced

    def _dense(self) -> dict[str, Tensor]:
        return {weight.name: weight.sites[0].dense() for weight in self._weights}

    def _target(self) -> int:
        return self._budget.zeros(self.rate)

    @property
    def _active(self) -> bool:
        feather = self._weights[0].sites[0].feather  # another's, where the model was sparsified anew
        return feather is not None and feather.shared is self._shared

    def _require_active(self, call: str) -> None:
        if not self._active:
            raise RuntimeError(f"expected {call} before desparsify, got it after: the model is plain again")

    def __repr__(self) -> str:
        rate = f"rate={self.rate:.4f} of {self._settings['final_rate']}"
        step = f"step {self.step_count} of {self._settings['total_steps']}"
        frozen = ", frozen" if self._frozen_step is not None else ""
        return f"Controller({rate}, {step}, {self._budget.total:,} weights{frozen})"

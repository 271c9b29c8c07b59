"""The one object with state: it moves the threshold of a model's weights from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from feather_param import schedules
from feather_param.baking import bake, baked
from feather_param.optimizers import check_optimizer, refuse_foreign_state
from feather_param.parametrizations import FeatherParametrization, SharedThreshold
from feather_param.report import Report, Row
from feather_param.selection import Filter, Selection, Weight, select, sparsified
from feather_param.thresholds import count_pruned, kth_magnitude, refuse_non_finite
from feather_param.warning import warn, warn_of_dead

__all__ = ["Controller", "baked_state_dict", "desparsify", "sparsify"]

Schedule = Callable[[float], float]

_VERSION = 1


def sparsify(
    model: nn.Module,
    *,
    final_rate: float,
    total_steps: int,
    start_step: int = 0,
    end_step: int | None = None,
    schedule: Schedule = schedules.cubic,
    p: float = 3.0,
    theta: float | None = None,
    include: Filter | None = None,
    exclude: Filter | None = None,
    min_params: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
) -> Controller:
    """Make a model train towards an exact sparsity, with Feather (https://arxiv.org/abs/2310.02448).

    Every Conv and Linear weight gets a `FeatherParametrization`: the forward pass sees the thresholded weight,
    the optimizer goes on training the dense one. Layers are not replaced and Parameters keep their identity, so
    the optimizer may be built before or after. Distributed wrappers (DDP, FSDP) come after.

    Args:
        model: any model, unmodified; it may itself be a layer.
        final_rate: fraction of zeros among all prunable weights together, in (0, 1).
        total_steps: number of optimizer steps of the training.
        start_step: first step at which weights are pruned.
        end_step: step from which the rate is ``final_rate``; ``total_steps // 2`` if None.
        schedule: maps progress in [0, 1] between these steps to the fraction of ``final_rate`` in [0, 1].
        p: exponent of the operator, a number >= 1 (1: soft thresholding) or ``math.inf`` (hard).
        theta: scale of the gradient of pruned weights; None takes the paper's rule, 0.5 where ``final_rate``
            is above 0.95, else 1.
        include: glob patterns or a predicate ``(name, module) -> bool``: prune only these (see `select`).
        exclude: the same for what stays dense.
        min_params: weights with fewer elements stay dense.
        optimizer: if given, each of its steps makes the controller's, so ``step()`` need not be called.

    Returns:
        The controller of this model.

    Raises:
        ValueError: an argument is out of its range, or the model cannot be pruned as asked; it is then untouched.
        TypeError: an argument is of the wrong type.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> controller = sparsify(model, final_rate=0.75, total_steps=4)
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1, 8)).sum().backward()
        ...     optimizer.step()
        ...     controller.step()
        >>> controller.report().zeros, controller.report().total
        (120, 160)
        >>> desparsify(model)
        >>> sum(int((layer.weight == 0).sum()) for layer in model if isinstance(layer, nn.Linear))
        120
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be an nn.Module, got {type(model).__name__}")
    final_rate = _real("final_rate", final_rate)
    if not 0.0 < final_rate < 1.0:
        raise ValueError(f"expected final_rate, the fraction of zeros, in (0, 1), got {final_rate}")
    total_steps = _integer("total_steps", total_steps, 1)
    start_step = _integer("start_step", start_step, 0)
    end_step = total_steps // 2 if end_step is None else _integer("end_step", end_step, 0)
    if not start_step <= end_step <= total_steps:
        raise ValueError(
            "expected start_step <= end_step <= total_steps, "
            f"got {start_step}, {end_step} and {total_steps}; end_step is total_steps // 2 unless given"
        )
    p = _real("p", p)
    if not p >= 1.0:
        raise ValueError(f"expected p >= 1 or math.inf, got {p}")
    theta = (0.5 if final_rate > 0.95 else 1.0) if theta is None else _real("theta", theta)
    if not 0.0 <= theta < math.inf:
        raise ValueError(f"expected theta to be a finite number >= 0, got {theta}")
    if not callable(schedule):
        raise TypeError(f"expected schedule to be a callable of progress, got {type(schedule).__name__}")
    for progress in (0.0, 0.5, 1.0):
        _fraction(schedule, progress)
    min_params = _integer("min_params", min_params, 0)
    _refuse_wrapped(model)
    selection = select(model, include, exclude, min_params)
    if optimizer is not None:
        check_optimizer(optimizer, selection)
    controller = Controller(
        selection,
        final_rate=final_rate,
        total_steps=total_steps,
        start_step=start_step,
        end_step=end_step,
        schedule=schedule,
        p=p,
        theta=theta,
    )
    if optimizer is not None:
        controller._follow(optimizer)
    return controller


class Controller:
    """The sparsity of one model over time. Made by `sparsify`; call `step` after each optimizer step.

    Attributes:
        threshold: the current threshold, a 0-dim float32 tensor.
        rate: the scheduled rate at the current step, a fraction of all prunable weights.
        step_count: number of optimizer steps seen.
    """

    def __init__(
        self,
        selection: Selection,
        *,
        final_rate: float,
        total_steps: int,
        start_step: int,
        end_step: int,
        schedule: Schedule,
        p: float,
        theta: float,
    ) -> None:
        self.step_count = 0
        self._schedule = schedule
        self._span = (start_step, end_step)
        self._skipped = selection.skipped
        self._optimizer: torch.optim.Optimizer | None = None
        self._weights = selection.weights
        self._total = sum(weight.numel() for weight in self._dense().values())
        self._config: dict[str, Any] = {
            "version": _VERSION,
            "final_rate": final_rate,
            "total_steps": total_steps,
            "start_step": start_step,
            "end_step": end_step,
            "schedule": getattr(schedule, "__qualname__", type(schedule).__qualname__),
            "p": p,
            "theta": theta,
            "weights": {name: list(weight.shape) for name, weight in self._dense().items()},
        }
        if round(final_rate * self._total) == self._total:
            raise ValueError(
                f"expected a final_rate that leaves a weight, got {final_rate} of {self._total} weights in all"
            )
        device = next(iter(self._dense().values())).device
        self._shared = SharedThreshold(self._total, device)
        # A copy of the threshold in memory that a GPU writes to when it gets there: NaN where the weights are not
        # finite. So a step can tell, one or two steps late, without ever waiting for the GPU.
        self._seen = torch.zeros((), pin_memory=True) if device.type == "cuda" else None
        pruned = self._target()
        threshold = kth_magnitude(self._dense(), pruned) if pruned else self._shared.threshold
        self._register(p, theta)
        self._shared.set(threshold, pruned)

    def _register(self, p: float, theta: float) -> None:
        orders = {site.module: tuple(site.module._parameters) for weight in self._weights for site in weight.sites}
        owner = True
        for weight in self._weights:
            for site in weight.sites:
                feather = FeatherParametrization(
                    self._shared, owner=owner, p=p, theta=theta, parameter_order=orders[site.module]
                )
                owner = False
                # unsafe: the check would run the operator, and our shapes and dtypes are right by construction.
                parametrize.register_parametrization(site.module, site.tensor, feather, unsafe=True)
                site.module.parametrizations.train(site.module.training)  # type: ignore[union-attr, operator]
                if site is weight.sites[0]:
                    feather.join(weight.name, site.parametrizations)

    def _follow(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        refuse_foreign_state(optimizer)
        handle = optimizer.register_step_post_hook(lambda *_: after_step())

        def after_step() -> None:
            if self._active:
                self._advance()
                return
            handle.remove()
            warn(
                "this optimizer has just stepped a model that was desparsified: momentum and weight decay bring "
                "pruned weights back to life, so its zeros are lost; build a new optimizer and sparsify again, "
                "or stop training before desparsify"
            )

    @property
    def threshold(self) -> Tensor:
        return self._shared.threshold.detach()

    @property
    def rate(self) -> float:
        start, end = self._span
        if self.step_count < start:
            return 0.0
        if self.step_count >= end:
            return self._config["final_rate"]
        return self._config["final_rate"] * _fraction(self._schedule, (self.step_count - start) / (end - start))

    def step(self) -> None:
        """Note that one optimizer step has been made: advance the schedule, refresh the threshold.

        Past ``total_steps`` the rate stays at ``final_rate``.

        Raises:
            RuntimeError: the model has been desparsified, or the optimizer given to `sparsify` steps already.
            ValueError: a weight holds NaN or infinity (named in the message); the controller has not advanced. On a
                GPU this is noticed one or two steps late, because no step waits for the device.
        """
        if self._optimizer is not None:
            raise RuntimeError(
                "expected step() not to be called: sparsify got optimizer=, whose every step already advances this "
                "controller; drop one of the two"
            )
        self._advance()

    def _advance(self) -> None:
        self._require_active("step()")
        self.step_count += 1
        try:
            self._refresh()
        except ValueError:
            self.step_count -= 1
            raise
        if self.step_count == self._span[1] and self.threshold.device.type == "cpu":
            self.report()  # the rate is final now: warn of layers that died

    def _refresh(self) -> None:
        if self._seen is not None and math.isnan(self._seen):
            refuse_non_finite(self._dense())
        pruned = self._target()
        threshold = kth_magnitude(self._dense(), pruned)
        self._shared.set(threshold, pruned)
        if self._seen is not None:
            self._seen.copy_(threshold, non_blocking=True)

    def report(self) -> Report:
        """Report what `desparsify` would leave at this moment, per weight and in all.

        Warns of weights of which nothing survives.

        Raises:
            RuntimeError: the model has been desparsified.
        """
        self._require_active("report()")
        weights = self._dense()
        pruned = self._target()
        counts = count_pruned(weights, kth_magnitude(weights, pruned), pruned)
        survivors = max(1, self._total - sum(count.zeros for count in counts.values()))
        rows = tuple(
            Row(
                name,
                tuple(weight.shape),
                weight.numel(),
                counts[name].zeros,
                (weight.numel() - counts[name].zeros) / survivors,
            )
            for name, weight in weights.items()
        )
        report = Report(rows, dict(self._skipped))
        warn_of_dead(report.dead)
        return report

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume, in plain Python values; loads with ``weights_only=True``."""
        return {**self._config, "step_count": self.step_count, "threshold": float(self.threshold)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where a controller of the same model and the same settings was saved.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            ValueError: it is from another version, model or setting; the controller is then untouched.
            RuntimeError: the model has been desparsified.
        """
        self._require_active("load_state_dict()")
        if not isinstance(state_dict, Mapping) or not {"version", "step_count", "threshold"} <= state_dict.keys():
            raise ValueError("expected the state_dict of a feather_param Controller, got something else")
        if state_dict["version"] != _VERSION:
            raise ValueError(
                f"expected a controller state of version {_VERSION}, got {state_dict['version']}; "
                "load it with the feather_param release that wrote it"
            )
        for key, ours in self._config.items():
            theirs = state_dict.get(key)
            if theirs == ours:
                continue
            if key == "weights":
                raise ValueError(f"expected a controller state of this model, got another's: {_differ(ours, theirs)}")
            raise ValueError(
                f"expected a controller state with {key}={ours}, got {theirs}; give sparsify the settings of the "
                "run you resume"
            )
        self.step_count = _integer("step_count", state_dict["step_count"], 0)
        self._shared.set(torch.tensor(state_dict["threshold"], dtype=torch.float32), self._target())

    def desparsify(self) -> None:
        """Bake exact zeros into the model's weights and give it back its plain layers; see `desparsify`."""
        self._require_active("desparsify()")
        bake(self._weights)

    def _dense(self) -> dict[str, Tensor]:
        return {weight.name: weight.sites[0].dense() for weight in self._weights}

    def _target(self) -> int:
        return round(self.rate * self._total)

    @property
    def _active(self) -> bool:
        return self._weights[0].sites[0].feather is not None

    def _require_active(self, call: str) -> None:
        if not self._active:
            raise RuntimeError(f"expected {call} before desparsify, got it after: the model is plain again")

    def __repr__(self) -> str:
        rate = f"rate={self.rate:.4f} of {self._config['final_rate']}"
        return f"Controller({rate}, step {self.step_count} of {self._config['total_steps']}, {self._total:,} weights)"


def desparsify(model: nn.Module) -> None:
    """Bake exact zeros into a sparsified model and give it back its plain layers.

    Afterwards exactly ``round(rate * N)`` of its N prunable weights are zero (more only if more were exactly zero
    by themselves), kept weights are not, and classes, Parameter objects, their order and the state_dict keys
    are those from before `sparsify`. The threshold is computed from the model's own weights, so a deepcopy or an
    EMA copy is exact too; other copies go on unharmed. Ties at the threshold are broken by position, and those
    kept become the smallest non-zero number of the dtype, so that the network computes what was evaluated.

    Do not step the old optimizer afterwards: momentum and weight decay would revive the zeros.

    Raises:
        ValueError: the model is not sparsified, or holds NaN or infinity; it is then untouched.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> controller = sparsify(model, final_rate=0.5, total_steps=1, schedule=schedules.constant)
        >>> desparsify(model)
        >>> int((model.weight == 0).sum()), type(model)
        (8, <class 'torch.nn.modules.linear.Linear'>)
    """
    bake(_weights_of(model))


def baked_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state_dict that `desparsify` would leave, without touching the model.

    Tensors that were not pruned are the model's own, as in ``model.state_dict()``; pruned ones are new.

    Raises:
        ValueError: the model is not sparsified, or holds NaN or infinity.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> controller = sparsify(model, final_rate=0.5, total_steps=1, schedule=schedules.constant)
        >>> {name: int((tensor == 0).sum()) for name, tensor in baked_state_dict(model).items()}
        {'weight': 8, 'bias': 0}
    """
    return baked(model, _weights_of(model))


def _weights_of(model: nn.Module) -> tuple[Weight, ...]:
    weights = sparsified(model)
    if not weights:
        raise ValueError(f"expected a sparsified model, got a plain {type(model).__name__}; call sparsify first")
    return weights


def _refuse_wrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__module__.startswith(("torch.distributed.fsdp", "torch.nn.parallel.distributed")):
                raise ValueError(
                    f"expected a model that is not yet wrapped, got {cls.__name__} at {name or 'the root'}; "
                    "the order is: sparsify(model), then DDP or fully_shard, then the optimizer"
                )


def _fraction(schedule: Schedule, progress: float) -> float:
    fraction = schedule(progress)
    if not isinstance(fraction, Real) or not 0.0 <= float(fraction) <= 1.0:
        raise ValueError(
            f"expected schedule to return a fraction in [0, 1] of final_rate, got {fraction!r} for progress {progress}"
        )
    return float(fraction)


def _real(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"expected {name} to be a number, got {value!r}")
    return float(value)


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected {name} to be an int, got {value!r}")
    if value < least:
        raise ValueError(f"expected {name} to be at least {least}, got {value}")
    return value


def _differ(ours: dict[str, list[int]], theirs: Any) -> str:
    theirs = theirs if isinstance(theirs, Mapping) else {}
    for name, shape in ours.items():
        if theirs.get(name) != shape:
            return f"{name} has shape {tuple(shape)} here and {tuple(theirs.get(name) or ()) or 'no entry'} there"
    return f"it also has {next(name for name in theirs if name not in ours)}"

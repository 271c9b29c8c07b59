"""What a user calls: make a model sparse, and plain again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from feather_param import schedules
from feather_param.controller import Controller
from feather_param.core.baking import bake, baked, check_other_parametrizations
from feather_param.core.config import Config, Theta
from feather_param.core.optimizer import checked_optimizer
from feather_param.ops.finite import require_finite
from feather_param.parametrizations import states_of
from feather_param.schedules import Schedule
from feather_param.selection.select import Filter, Selection, select
from feather_param.utils.warn import warn


def sparsify(
    model: nn.Module,
    *,
    final_rate: float,
    total_steps: int,
    start_step: int = 0,
    end_step: int | None = None,
    schedule: Schedule = schedules.cubic,
    p: float = 3.0,
    theta: float | Theta | None = None,
    include: Filter | None = None,
    exclude: Filter | None = None,
    min_params: int = 0,
    max_rate_per_layer: float | None = None,
    min_nonzero_per_layer: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
) -> Controller:
    """Make a model train towards an exact sparsity, with Feather (https://arxiv.org/abs/2310.02448).

    Every Conv and Linear weight gets a `FeatherParametrization`: the forward pass sees the thresholded weight,
    the optimizer goes on training the dense one. The optimizer may be built before or after, for Parameters keep
    their identity; distributed wrappers (DDP, FSDP) come after.

    Args:
        model: any model, unmodified; it may itself be a layer.
        final_rate: fraction of zeros among all prunable weights together, in (0, 1).
        total_steps: number of optimizer steps of the training; it counts only where ``end_step`` is None.
        start_step: first step at which weights are pruned.
        end_step: step from which the rate is ``final_rate``; ``total_steps // 2`` if None, so a single step prunes all.
        schedule: maps progress in [0, 1] between these steps to the fraction of ``final_rate`` in [0, 1].
        p: exponent of the operator, a number >= 1 (1: soft thresholding) or ``math.inf`` (hard).
        theta: scale of the gradient of pruned weights, also a function of the current rate
            (``lambda rate: 1.0 if rate < 0.9 else 0.5``); None: 0.5 where ``final_rate`` is above 0.95, else 1.
        include: glob patterns or a predicate ``(name, module) -> bool``: prune only these (see `select`).
        exclude: the same for what stays dense.
        min_params: weights with fewer elements stay dense.
        max_rate_per_layer: no weight gets a larger fraction of zeros than this, in (0, 1); the others get more
            instead (`plan` tells whether the total can be reached).
        min_nonzero_per_layer: in no weight fewer elements than this survive.
        optimizer: if given, each of its steps makes the controller's, and nobody calls ``step()`` (see
            `Controller.follow`).

    Returns:
        The controller of this model.

    Raises:
        ValueError: an argument is out of its range, or the model cannot be pruned as asked; it is then untouched.
        TypeError: an argument is of the wrong type.

    Example:
        >>> _ = torch.manual_seed(1)
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
    selection = select(model, include, exclude, min_params)
    config = Config(
        final_rate=final_rate,
        total_steps=total_steps,
        start_step=start_step,
        end_step=end_step,
        schedule=schedule,
        p=p,
        theta=theta,
        max_rate_per_layer=max_rate_per_layer,
        min_nonzero_per_layer=min_nonzero_per_layer,
    )
    config.budget(selection.sizes).require(config.final_rate)
    check_other_parametrizations(selection.weights)
    require_finite(selection.dense(), new=True)
    followed = (
        None
        if optimizer is None
        else checked_optimizer(optimizer, {weight.name: weight.sites[0].originals for weight in selection.weights})
    )
    if include is None:
        _warn_of_left_out(model, selection)
    controller = Controller(model, config, selection)
    if followed is not None:
        controller._follow(followed)
    return controller


def desparsify(model: nn.Module) -> None:
    """Bake exact zeros into a sparsified model and give it back its plain layers.

    Afterwards exactly ``round(rate * N)`` of its N prunable weights are zero (more only if more were exactly zero
    by themselves), and classes, Parameter objects, their order and the state_dict keys are those from before
    `sparsify`. Deepcopies and EMA copies are exact too. Ties at the threshold are broken by position, and those kept
    become the smallest non-zero number of the dtype, so that the network computes what was evaluated.

    Do not step the old optimizer afterwards: momentum and weight decay would revive the zeros (one that the controller
    follows warns). Warns before the schedule's end, as after a forgotten `Controller.step`; copies and frozen models
    may be baked early.

    Raises:
        ValueError: the model is not sparsified, or holds NaN, infinity or no values; it is then untouched.
        TypeError: it is no model.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> controller = sparsify(model, final_rate=0.5, total_steps=1, schedule=schedules.constant)
        >>> desparsify(model)
        >>> int((model.weight == 0).sum()), type(model)
        (8, <class 'torch.nn.modules.linear.Linear'>)
    """
    bake(_sparsified(model))


def baked_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state_dict that `desparsify` would leave, without touching the model.

    Tensors that were not pruned are the model's own, as in ``model.state_dict()``; pruned ones are new.

    Raises:
        ValueError: the model is not sparsified, or holds NaN, infinity or no values.
        TypeError: it is no model.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> controller = sparsify(model, final_rate=0.5, total_steps=1, schedule=schedules.constant)
        >>> {name: int((tensor == 0).sum()) for name, tensor in baked_state_dict(model).items()}
        {'weight': 8, 'bias': 0}
    """
    return baked(_sparsified(model))


def _sparsified(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        hint = "; call its desparsify(), or name its model" if isinstance(model, Controller) else ""
        raise TypeError(f"expected model to be an nn.Module, got {type(model).__name__}{hint}")
    if not states_of(model):
        raise ValueError(f"expected a sparsified model, got a plain {type(model).__name__}; call sparsify first")
    return model


def _warn_of_left_out(model: nn.Module, selection: Selection) -> None:
    """Warn if most of a model's matrix elements stay dense, and nobody asked for it."""
    taken = {id(original) for weight in selection.weights for original in weight.sites[0].originals}
    asked = {name for name, reason in selection.skipped.items() if not reason.startswith(("a weight of", "tied to"))}
    left = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and id(parameter) not in taken and name not in asked
    }
    total = sum(selection.sizes.values())
    if sum(left.values()) > total:
        largest = max(left, key=lambda name: left[name])
        warn(
            f"sparsify takes {total:,} of the {total + sum(left.values()):,} elements of this model's matrices; the "
            f"others stay dense, the largest being {largest} with {left[largest]:,}; name them in include to prune "
            "them, or in exclude to keep them so (print(feather_param.plan(...)) lists them)"
        )

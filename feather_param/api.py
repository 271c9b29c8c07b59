"""The functions that are called with a model: sparsify, desparsify, baked_state_dict and save_sparse."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import feather_param.patterns as patterns
import feather_param.schedules as schedules
from feather_param.allocations import Allocation, global_magnitude
from feather_param.controller import Controller
from feather_param.core.baked_state import baked_state
from feather_param.core.baking import bake, baked
from feather_param.core.checked_selection import checked_selection
from feather_param.core.config import Config, Theta
from feather_param.core.final_groups import final_groups
from feather_param.core.optimizer import checked_optimizer
from feather_param.core.state_dict import of_sparsified
from feather_param.files.sparse import write_sparse
from feather_param.inference.choices import Choices
from feather_param.parametrizations import states_of
from feather_param.patterns import Pattern
from feather_param.schedules import Schedule
from feather_param.selection.globs import Filter
from feather_param.selection.select import Selection
from feather_param.selection.weights import is_matrix
from feather_param.utils.warn import warn


def sparsify(
    model: nn.Module,
    *,
    final_rate: float,
    total_steps: int,
    start_step: int = 0,
    end_step: int | None = None,
    schedule: Schedule = schedules.cubic,
    allocation: Allocation = global_magnitude,
    pattern: Pattern | None = None,
    p: float = 3.0,
    theta: float | Theta | None = None,
    include: Filter | None = None,
    exclude: Filter | None = None,
    min_params: int = 0,
    max_rate_per_layer: float | None = None,
    min_nonzero_per_layer: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
) -> Controller:
    """Train a model to an exact sparsity, with Feather (https://arxiv.org/abs/2310.02448).

    Each Conv and Linear weight gets a `FeatherParametrization`: the forward pass uses the thresholded weight, and the
    optimizer trains the dense one. Parameters keep their identity, so the optimizer may be built before or after.
    Distributed wrappers (DDP, FSDP2) come after.

    Args:
        model: any model, unmodified. It may be a single layer.
        final_rate: fraction of zeros among all prunable weights together, in (0, 1).
        total_steps: number of optimizer steps of the training. ``end_step`` is half of it by default, and not larger.
        start_step: step at which the schedule starts. With `cubic` and `linear` the rate is still 0 there.
        end_step: first step with the rate ``final_rate``; None: ``total_steps // 2`` (0 if ``total_steps`` is 1).
        schedule: maps the progress between these steps, in [0, 1], to a fraction of ``final_rate``, in [0, 1].
        allocation: how many zeros each weight gets: one of `feather_param.allocations`, or a function
            ``(weights, zeros, guards) -> groups``. By default all weights have one threshold. The total is the same for
            all allocations.
        pattern: which elements are pruned together: ``patterns.n_m(2, 4)``, ``patterns.blocks(1, 4)``; None: each
            element by itself.
        p: exponent of the operator, a number > 0 (1: soft thresholding) or ``math.inf`` (hard thresholding). The
            smaller, the more weights near the threshold shrink.
        theta: scale of the gradient of pruned weights: a number >= 0, or a function of the current rate
            (``lambda rate: 1.0 if rate < 0.9 else 0.5``); None: 0.5 if ``final_rate`` is above 0.95, else 1.
        include: prune only these weights: globs on names, or a predicate ``(name, module) -> bool``. A glob matches
            the name of a module or of a weight. One that ends with the name of a tensor (``"lstm.weight_*"``) also
            selects weights of layers that are not Linear or Conv, and the adapters of peft (``lora_A``).
        exclude: leave these weights dense, in the same form.
        min_params: leave weights with fewer elements dense.
        max_rate_per_layer: largest fraction of zeros of a weight, in (0, 1). The other weights get more zeros, so that
            the total is exact (`plan` tells whether it can be reached).
        min_nonzero_per_layer: smallest number of elements that a weight keeps.
        optimizer: an optimizer whose steps advance the controller; then do not call ``step()`` (see
            `Controller.follow`).

    Returns:
        The controller of this model.

    Raises:
        ValueError: an argument is out of range, or the model cannot be pruned in this way. The model is untouched.
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
    selection = checked_selection(model, include, exclude, min_params)
    config = Config(
        final_rate=final_rate,
        total_steps=total_steps,
        start_step=start_step,
        end_step=end_step,
        schedule=schedule,
        allocation=allocation,
        pattern=patterns.elements if pattern is None else pattern,
        p=p,
        theta=theta,
        max_rate_per_layer=max_rate_per_layer,
        min_nonzero_per_layer=min_nonzero_per_layer,
    )
    config.pattern.require_fit(selection.dense())
    config.budget(selection.sizes).require(config.final_rate)
    final_groups(config, selection.dense())
    followed = (
        None
        if optimizer is None
        else checked_optimizer(optimizer, {weight.name: weight.places[0].originals for weight in selection.weights})
    )
    if include is None:
        _warn_of_skipped(model, selection)
    controller = Controller(model, config, selection)
    if followed is not None:
        controller._follow(followed)
    return controller


def desparsify(model: nn.Module) -> None:
    """Write exact zeros into the weights of a sparsified model and make its layers plain again.

    Exactly ``round(rate * N)`` of the N prunable weights are zero then, or more if more dense weights are exactly zero.
    The classes of the layers, the Parameters, their order and the keys of the state_dict are those from before
    `sparsify`. This holds for deepcopies and moving averages, too. Ties at the threshold are broken by position. A tie
    that is kept becomes a negligible non-zero number, since the operator computed zero for it. The zeros are written
    into the memory of the Parameters, as an optimizer writes, so it must not be a read-only mapping of a file.

    Do not step the old optimizer afterwards: momentum and weight decay would change the zeros. An optimizer that the
    controller follows warns about this. A call before the end of the schedule warns, since a forgotten
    `Controller.step` is a likely cause. Copies and frozen models may be baked early.

    Raises:
        ValueError: the model is not sparsified, or a weight holds NaN or infinity, or shares memory with another one.
        RuntimeError: a weight has no values (meta device). On each error, the model is untouched.
        TypeError: it is no model.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> controller = sparsify(model, final_rate=0.5, total_steps=1, schedule=schedules.constant)
        >>> desparsify(model)
        >>> int((model.weight == 0).sum()), type(model)
        (8, <class 'torch.nn.modules.linear.Linear'>)
    """
    bake(_require_sparsified(model))


def baked_state_dict(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state_dict that a model would have after `desparsify`, without changing the model.

    Pruned weights are new tensors. Other tensors are the model's own, as in ``model.state_dict()``.

    Args:
        source: a sparsified model, or its saved ``state_dict()``: this needs no model, and has the same result. The
            command ``feather-param bake`` does it for a file.

    Raises:
        ValueError: the model is not sparsified, or a weight holds NaN or infinity. The state is plain already, damaged
            or incomplete, or it does not tell all that its zeros depend on: the pattern is none of
            `feather_param.patterns`, or a weight carries parametrizations of other libraries (pass the model then).
        RuntimeError: a weight of the model has no values (meta device).
        TypeError: it is neither a model nor a state_dict.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> controller = sparsify(model, final_rate=0.5, total_steps=1, schedule=schedules.constant)
        >>> {name: int((tensor == 0).sum()) for name, tensor in baked_state_dict(model).items()}
        {'weight': 8, 'bias': 0}
        >>> list(model.state_dict()), list(baked_state_dict(model.state_dict()))  # doctest: +NORMALIZE_WHITESPACE
        (['bias', 'parametrizations.weight.original', 'parametrizations.weight.0.shared._extra_state'],
         ['weight', 'bias'])
    """
    return baked_state(source) if isinstance(source, Mapping) else baked(_require_sparsified(source))


def save_sparse(
    source: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    zstd: bool = False,
    choices: Choices | None = None,
) -> None:
    """Save a model or a state_dict without its zeros.

    A tensor with enough zeros is stored as its non-zero elements and the gaps between them; a gap takes one byte. Other
    tensors are stored dense. Tied tensors are stored once. `load_sparse` restores every bit, also of -0.0 and NaN. The
    file is written under a temporary name and renamed, so ``path`` always holds a complete file, also if several
    processes write it.

    Args:
        source: a model or a state_dict. Of a sparsified model, its `baked_state_dict` is saved.
        path: the file. It has the safetensors format.
        zstd: whether to compress with zstandard as well.
        choices: those of a report of `to_sparse_inference`, which are stored too. `inference.load_choices` loads them.

    Raises:
        TypeError: ``source`` is neither a model nor a state_dict, ``choices`` are of another type, or an entry cannot
            be stored: it is no tensor, or it is quantised, not strided, sharded, or without content (meta, lazy), or
            its name is no string.
        ValueError: ``path`` is a folder, a device or a pipe, a tensor has more than 64 dimensions, a name has a lone
            surrogate, or the names are too long for a header of 100 MB.
        OSError: the file cannot be written, for example because its folder does not exist or the disk is full. The
            error has the path.
        ImportError: ``zstd`` is True and zstandard is not installed: ``pip install feather_param[files]``.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_sparse({"w": torch.eye(100)}, path)
        >>> torch.equal(feather_param.load_sparse(path)["w"], torch.eye(100)), path.stat().st_size < 1500
        (True, True)
    """
    if not isinstance(source, nn.Module | Mapping):
        raise TypeError(f"expected a model or a state_dict, got {type(source).__name__}")
    if choices is not None and not isinstance(choices, Choices):
        raise TypeError(f"expected choices of an inference report, got {type(choices).__name__}")
    if isinstance(source, nn.Module):
        source = baked_state_dict(source) if states_of(source) else source.state_dict()
    write_sparse(source, path, zstd=zstd, metadata=choices and choices.metadata)
    if of_sparsified(source):
        warn(
            "expected baked weights, got the state_dict of a sparsified model, which does not contain its zeros: it is "
            "saved dense; to save the zeros, pass the model, or baked_state_dict(model)"
        )


def _require_sparsified(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        hint = "; call its desparsify(), or pass its model" if isinstance(model, Controller) else ""
        raise TypeError(f"expected model to be an nn.Module, got {type(model).__name__}{hint}")
    if not states_of(model):
        raise ValueError(f"expected a sparsified model, got a plain {type(model).__name__}; call sparsify first")
    return model


def _warn_of_skipped(model: nn.Module, selection: Selection) -> None:
    """Warn if most elements of the model's matrices stay dense although no argument says so."""
    taken = {id(original) for weight in selection.weights for original in weight.places[0].originals}
    asked = selection.skipped.keys() - selection.dense_by_default
    left = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if is_matrix(parameter) and id(parameter) not in taken and name not in asked
    }
    total = sum(selection.sizes.values())
    if sum(left.values()) > total:
        largest = max(left, key=lambda name: left[name])
        warn(
            f"sparsify prunes only {total:,} of the {total + sum(left.values()):,} elements of this model's matrices; "
            f"the others stay dense, the largest being {largest} with {left[largest]:,}; name them in include to prune "
            "them, or in exclude to leave them dense (print(feather_param.plan(...)) lists them)"
        )

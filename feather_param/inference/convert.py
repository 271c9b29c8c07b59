"""Convert a pruned model for faster inference on a CPU: fuse its layers, and swap those that are faster sparse."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from feather_param.inference import timing
from feather_param.inference.choices import Choices, machine
from feather_param.inference.fit import unfit
from feather_param.inference.fuse import FusedLayer, fused
from feather_param.inference.layers import SparseLayer
from feather_param.inference.report import InferenceReport, InferenceRow
from feather_param.ops.values import require_values
from feather_param.parametrizations import states_of
from feather_param.selection.names import COMPILED
from feather_param.selection.weights import LINEAR_AND_CONV
from feather_param.utils.text import printable

_MAX_FRACTION = 0.95  # of the time of a simpler network; smaller gains are within the noise of the timings
_Slot = tuple[dict[str, Any], str, tuple[nn.Module, nn.Module]]
"""Where a layer is registered: its parent's children, its name among them, and the dense and the sparse layer."""


def to_sparse_inference(
    model: nn.Module, example_input: Any, *, choices: Choices | None = None
) -> tuple[nn.Module, InferenceReport]:
    """Return a copy of a pruned model that computes without zeros where that is faster, and the measurements.

    The model is traced with `torch.fx`. Batch norms are folded into the Linear and Conv layers before them, and an
    addition and a ReLU, ReLU6, SiLU, Hardswish or GELU are computed with the layer before them. A model that cannot be
    traced keeps its code, and the report says why.

    Then each layer is timed on the inputs that it gets for the example, dense and sparse in turns. A layer is swapped
    for a `SparseLayer` if that takes less than 0.9 of the dense time. Last, the network is timed as it was, fused, and
    with sparse layers. The fastest is returned; a step that does not take less than 0.95 of the time is not taken.

    The outputs are those of the model up to rounding, also for inputs of other sizes. The choice of layers holds for
    the example's size, this kind of machine and this number of threads (`torch.set_num_threads`).

    The copy is for inference on a CPU in float32. Its parameters require no gradient. It can be copied and pickled. Its
    state_dict has other keys than that of the model, so save the model (`save_sparse`) and convert it after loading.

    Args:
        model: a baked or otherwise pruned model, in eval mode. It is not changed.
        example_input: a tensor, or a tuple of arguments, as in a typical call.
        choices: of an earlier report, or from `load_choices`. Nothing is timed if they were made on the same kind of
            machine with the same number of threads. Otherwise they are ignored.

    Returns:
        The copy, and a report whose ``str()`` is a table. A model that was traced becomes a `torch.fx.GraphModule`.

    Raises:
        TypeError: ``model`` is no `nn.Module` or a scripted one, ``example_input`` is no tensor or tuple, or
            ``choices`` are of another type.
        ValueError: the model is sparsified, compiled, lazy or in training mode, or has no float32 Linear or Conv layer
            on the CPU, or ``choices`` are those of another model.
        RuntimeError: a Parameter has no values (meta device).
        ImportError: llvmlite is not installed: ``pip install feather_param[inference]``.

    Example:
        >>> model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)).eval()
        >>> _ = nn.init.sparse_(model[0].weight, 0.99)
        >>> x = torch.randn(1, 512)
        >>> fast, report = to_sparse_inference(model, x)
        >>> torch.allclose(fast(x), model(x), atol=1e-5)
        True
    """
    arguments = _checked(model, example_input)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LINEAR_AND_CONV)}
    reasons = {name: unfit(layer) for name, layer in layers.items()}
    if all(reasons.values()):
        first = "".join(f"; {printable(name or 'the layer')}: {reason}" for name, reason in [*reasons.items()][:1])
        raise ValueError(f"expected a Linear or Conv layer in float32 on the CPU, got none{first}")
    require_values(model.named_parameters())
    notes = []
    if choices is not None and not isinstance(choices, Choices):
        raise TypeError(f"expected choices of a report or of load_choices, got {type(choices).__name__}")
    if choices is not None and not choices.hold_here:
        notes.append(f"timed again: the choices are for {printable(choices.machine)}, {choices.threads} threads")
        choices = None
    with torch.no_grad():
        graph, untraced = fused(model, arguments, verify=choices is None)
        twin = _sharing_tensors(model) if graph is None else graph
        body = nn.ModuleList([twin])  # a parent for a model that is itself a layer
        if graph is None:
            notes.append(f"not fused: {untraced}")
        found = {name: layer for name, layer in _candidates(body[0]).items() if not reasons.get(name)}
        if choices is None:
            trials = {name: timing.Trial(layer, SparseLayer(layer)) for name, layer in found.items()}
            timing.run_trials(trials.values(), lambda: body[0](*arguments))
            swaps = {name: trial.sparse for name, trial in trials.items() if trial.wins}
        else:
            trials, swaps = {}, {name: SparseLayer(found[name]) for name in _known(choices.sparse, found)}
        slots = _slots(body, {found[name]: new for name, new in swaps.items()})
        milliseconds: Mapping[str, float] = {}
        if choices is None:
            milliseconds = _timed(model, body, slots, arguments)
            best = _best(milliseconds)
            choices = Choices(machine(), torch.get_num_threads(), best, tuple(swaps) if best == "sparse" else ())
        _put(slots, choices.network == "sparse")
    kept: dict[int, Any] = {id(new): new for new in swaps.values()}
    network = copy.deepcopy(model if choices.network == "dense" else body[0], kept).requires_grad_(False)
    rows = tuple(
        _row(name, layer, trials.get(name), reasons[name], swaps.get(name), choices) for name, layer in layers.items()
    )
    report = InferenceReport(
        rows,
        dense_ms=milliseconds.get("dense"),
        sparse_ms=milliseconds.get(choices.network),
        dense_mb=_megabytes(model.parameters(), model.buffers()),
        sparse_mb=_megabytes(network.parameters(), network.buffers()),
        choices=choices,
        notes=tuple(notes),
    )
    return network, report


def _checked(model: Any, example_input: Any) -> tuple[Any, ...]:
    """Raise an error for models that cannot be converted; return the arguments of a call."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"expected model to be an nn.Module that is not scripted, got {type(model).__name__}")
    if not isinstance(example_input, Tensor | tuple):
        got = type(example_input).__name__
        raise TypeError(f"expected example_input to be a tensor or a tuple of arguments, got {got}")
    if hasattr(model, COMPILED):
        raise ValueError("expected a model that is not compiled; pass the model that you gave to torch.compile")
    if states_of(model):
        raise ValueError("expected a baked model, got one that is still sparsified; call desparsify(model) first")
    if any(map(is_lazy, model.parameters())):
        raise ValueError("expected a model whose weights have their shapes, got a lazy one; call it once first")
    for name, module in model.named_modules():
        if module.training:
            got = f"{printable(name or 'the model')} in training mode"
            raise ValueError(f"expected a model in eval mode, got {got}; call model.eval() first")
    return example_input if isinstance(example_input, tuple) else (example_input,)


def _sharing_tensors(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares its Parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _candidates(body: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that may be swapped, by name."""
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()  # of a fused layer
    for name, module in body.named_modules():
        if isinstance(module, FusedLayer):
            inside.update(module.children())
        if isinstance(module, (FusedLayer, *LINEAR_AND_CONV)) and module not in inside:
            found[name] = module
    return found


def _known(names: Iterable[str], found: Mapping[str, nn.Module]) -> Iterable[str]:
    """Return the names of choices, if the model has these layers."""
    unknown = sorted(set(names) - found.keys())
    if unknown:
        got = f"choices that name {printable(unknown[0])}, which it lacks"
        raise ValueError(f"expected choices for this model, got {got}; convert without choices")
    return names


def _slots(root: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> list[_Slot]:
    """Return the slots of the layers to swap. A layer that is registered several times has several slots."""
    return [
        (parent._modules, key, (child, swaps[child]))
        for parent in root.modules()
        for key, child in parent._modules.items()
        if child is not None and child in swaps
    ]


def _put(slots: list[_Slot], sparse: bool) -> None:
    """Put the dense or the sparse layers into the model."""
    for modules, key, pair in slots:
        modules[key] = pair[sparse]


def _timed(model: nn.Module, body: nn.ModuleList, slots: list[_Slot], arguments: tuple[Any, ...]) -> dict[str, float]:
    """Return the milliseconds of the model, of the fused one, and of that with sparse layers."""

    def run(sparse: bool) -> None:
        _put(slots, sparse)
        body[0](*arguments)

    calls = {"dense": lambda: model(*arguments), "fused": lambda: run(False), "sparse": lambda: run(True)}
    return {name: 1e3 * seconds for name, seconds in timing.seconds_of(calls).items()}


def _best(times: Mapping[str, float]) -> str:
    """Return the fastest network; one that is not clearly faster than a simpler one does not count."""
    best = "dense"
    for name in ("fused", "sparse"):
        if times[name] < _MAX_FRACTION * times[best]:
            best = name
    return best


def _row(
    name: str, layer: Any, trial: timing.Trial | None, reason: str, sparse: nn.Module | None, choices: Choices
) -> InferenceRow:
    """Return the row of a layer."""
    method = "sparse" if sparse is not None and choices.network == "sparse" else "dense"
    timed = trial is not None and trial.called
    if method == "dense" and not reason:
        if trial is not None:
            reason = "its forward was not called" if not trial.called else "the dense layer is as fast"
            reason = "the network as a whole became no faster" if trial.wins else reason
        elif not sparse:
            reason = "its forward was not called"
    weight = layer.weight
    return InferenceRow(
        name,
        tuple(weight.shape),
        1.0 - int(weight.count_nonzero()) / max(1, weight.numel()),
        method,
        1e3 * trial.dense_seconds if timed else None,
        1e3 * trial.sparse_seconds if timed else None,
        _megabytes(layer.parameters()),
        _megabytes((trial.sparse if timed else sparse).buffers()) if timed or sparse else None,
        reason,
    )


def _megabytes(*tensors: Iterable[Tensor]) -> float:
    return sum(tensor.nbytes for tensor in itertools.chain(*tensors)) / 1e6

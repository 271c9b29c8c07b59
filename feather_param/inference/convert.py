"""Convert a pruned model for faster inference on a CPU: fuse its layers, and swap those that are faster sparse."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from feather_param.inference import timing
from feather_param.inference.choices import Choices, machine
from feather_param.inference.fit import unfit
from feather_param.inference.fusing.fuse import FusedLayer, fused
from feather_param.inference.fusing.tracer import Untraceable, hooked
from feather_param.inference.fusing.tracing import require_same_outputs
from feather_param.inference.layers import SparseLayer
from feather_param.inference.pooling import MAX_POOLS, FastMaxPool
from feather_param.inference.report import InferenceReport, InferenceRow
from feather_param.ops.values import require_values
from feather_param.parametrizations import states_of
from feather_param.selection.names import COMPILED
from feather_param.selection.weights import LINEAR_AND_CONV
from feather_param.utils.text import printable

_MAX_FRACTION = 0.95  # of the time of a simpler network; smaller gains are within the noise of the timings
_NOT_CALLED = "its forward was not called"


def to_sparse_inference(
    model: nn.Module, example_input: Any, *, choices: Choices | None = None
) -> tuple[nn.Module, InferenceReport]:
    """Return a copy of a pruned model that computes without zeros where that is faster, and the measurements.

    The model is traced with `torch.fx`. Batch norms are folded into the Linear and Conv layers before them, and an
    addition and a ReLU, ReLU6, SiLU, Hardswish or GELU are computed with the layer before them. A model that cannot be
    traced keeps its code, and the report says why.

    Then each layer is timed on the inputs that it gets for the example, dense and sparse in turns. A layer is swapped
    for a `SparseLayer` if that takes less than 0.9 of the dense time. Last, the network is timed as it was, fused, and
    with sparse layers, after its outputs for the example were compared. The fastest is returned; a step that does not
    take less than 0.95 of the time is not taken.

    The outputs are those of the model up to rounding, also for inputs of other sizes. The choice of layers holds for
    the example's size, this kind of machine and this number of threads (`torch.set_num_threads`).

    The copy is for inference on a CPU in float32. Its parameters require no gradient. It can be copied and pickled. Its
    state_dict has other keys than that of the model, so save the model (`save_sparse`) and convert it after loading.

    Args:
        model: a baked or otherwise pruned model, in eval mode. It is not changed. A copy that shares its Parameters is
            called.
        example_input: a tensor, or a tuple of arguments, as in a typical call.
        choices: of an earlier report, or from `load_choices`. Nothing is timed if they were made on the same kind of
            machine with the same number of threads, and outputs are not compared. Otherwise they are ignored.

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
    with torch.inference_mode(False), torch.no_grad():
        return _converted(model, _checked(model, example_input), choices)


def _converted(
    model: nn.Module, arguments: tuple[Any, ...], choices: Choices | None
) -> tuple[nn.Module, InferenceReport]:
    """Return the copy and the report of `to_sparse_inference`."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LINEAR_AND_CONV)}
    reasons = {name: unfit(layer) for name, layer in layers.items()}
    if all(reasons.values()):
        first = "".join(f"; {printable(name or 'the layer')}: {reason}" for name, reason in [*reasons.items()][:1])
        raise ValueError(f"expected a Linear or Conv layer in float32 on the CPU, got none{first}")
    require_values(model.named_parameters())
    notes: list[str] = []
    if choices is not None and not isinstance(choices, Choices):
        raise TypeError(f"expected choices of a report or of load_choices, got {type(choices).__name__}")
    if choices is not None and not choices.hold_here:
        notes.append(f"timed again: the choices are for {printable(choices.machine)}, {choices.threads} threads")
        choices = None
    here = machine()
    private = _copy(model, model.parameters())  # only it is called, as a forward may change buffers and attributes
    graph, untraced = None, choices.untraced if choices else ""
    if not untraced:
        graph, untraced = fused(private, arguments, verify=choices is None)
    if untraced:
        notes.append(f"not fused: {printable(untraced)}")
    body = private if graph is None else graph
    body = _copy(body, body.parameters(), body.buffers())
    for name in _read(graph) if graph is not None else ():
        if name in reasons:
            reasons[name] = reasons[name] or "other code reads its weight"
    found = {name: layer for name, layer in _candidates(body).items() if not reasons.get(name)}
    reasons = {name: reason or ("" if name in found else _NOT_CALLED) for name, reason in reasons.items()}
    trials: dict[str, timing.Trial] = {}
    times: Mapping[str, float] = {}
    if choices is None:
        trials = {name: timing.Trial(layer, _fast) for name, layer in found.items()}
        timing.run_trials(trials.values(), lambda: body(*arguments))
        swaps = {name: trial.sparse for name, trial in trials.items() if trial.sparse}
        times, failed = _timed(private, graph, _swapped(body, swaps) if swaps else None, arguments)
        if failed:
            notes.append(f"no layer is sparse: {printable(failed)}")
            reasons.update({name: reasons.get(name) or failed for name in swaps})
        best = _best(times)
        choices = Choices(here, torch.get_num_threads(), best, tuple(swaps) if best == "sparse" else (), untraced)
    else:
        swaps = {name: _fast(found[name]) for name in _known(choices.sparse, found)}
    network = model if graph is None or choices.network == "dense" else graph
    shared = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    if choices.network == "sparse":
        network = _swapped(_copy(network, network.parameters(), network.buffers()), swaps)
    own = [tensor for tensor in (*network.parameters(), *network.buffers()) if id(tensor) not in shared]
    network = _copy(network, own, swaps.values()).requires_grad_(False)
    listed = {name: layer for name, layer in model.named_modules() if name in layers or name in found}
    rows = tuple(
        _row(name, layer, trials.get(name), reasons.get(name, ""), swaps, choices) for name, layer in listed.items()
    )
    report = InferenceReport(
        rows,
        dense_ms=times.get("dense"),
        sparse_ms=times.get(choices.network),
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
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), arguments)  # a call may change them


def _copy(module: nn.Module, *shared: Iterable[Any]) -> Any:
    """Return a deep copy of a module that shares some tensors and modules.

    Inference tensors become ordinary ones, and so do computed ones, which torch cannot copy (`nn.utils.weight_norm`).
    """
    attributes = pytree.tree_leaves([vars(part) for part in module.modules()])
    computed = [value for value in attributes if isinstance(value, Tensor) and not value.is_leaf]
    kept: dict[int, Any] = {id(value): value.detach().clone() for value in computed}
    for value in itertools.chain(*shared):
        if not (isinstance(value, Tensor) and value.is_inference()):
            kept[id(value)] = value
    return copy.deepcopy(module, kept)


def _candidates(body: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that may be swapped, by name."""
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()  # of a fused layer
    for name, module in body.named_modules():
        if isinstance(module, FusedLayer):
            inside.update(module.children())
        if isinstance(module, (FusedLayer, *LINEAR_AND_CONV)) and module not in inside:
            found[name] = module
        plain = type(module) in MAX_POOLS and not hooked(module) and "forward" not in vars(module)
        if plain and isinstance(module, MAX_POOLS) and not module.return_indices:
            found[name] = module
    return found


def _fast(layer: nn.Module) -> nn.Module:
    """Return what may take the place of a layer."""
    return (FastMaxPool(layer) if isinstance(layer, MAX_POOLS) else SparseLayer(layer)).eval()


def _read(graph: fx.GraphModule) -> set[str]:
    """Return the names of modules of which the graph reads a tensor by itself."""
    return {str(node.target).rpartition(".")[0] for node in graph.graph.nodes if node.op == "get_attr"}


def _known(names: Iterable[str], found: Mapping[str, nn.Module]) -> Iterable[str]:
    """Return the names of choices, if the model has these layers."""
    unknown = sorted(set(names) - found.keys())
    if unknown:
        got = f"choices that name {printable(unknown[0] or 'the model')}, which it lacks or which cannot be sparse"
        raise ValueError(f"expected choices for this model, got {got}; convert without choices")
    return names


def _swapped(network: nn.Module, swaps: Mapping[str, nn.Module]) -> nn.Module:
    """Put layers in the place of those of the given names, wherever these are registered; return the network."""
    body = nn.ModuleList([network])  # a parent for a network that is itself a layer
    new = {network.get_submodule(name): layer for name, layer in swaps.items()}
    for parent in [*body.modules()]:
        for key, child in parent._modules.items():
            if child in new:
                parent._modules[key] = new[child]
    return body[0]


def _timed(
    model: nn.Module, graph: nn.Module | None, sparse: nn.Module | None, arguments: tuple[Any, ...]
) -> tuple[dict[str, float], str]:
    """Return the milliseconds of the model, of the fused one, and of that with sparse layers if it gives the same."""
    networks, failed = {"dense": model}, ""
    if graph is not None:
        networks["fused"] = graph
    if sparse is not None:
        try:
            require_same_outputs(sparse, model, arguments)
            networks["sparse"] = sparse
        except Exception as error:
            failed = f"the network with sparse layers fails: {error}"
            if isinstance(error, Untraceable):
                failed = "the network with sparse layers gives other outputs"
    calls = {name: functools.partial(network, *arguments) for name, network in networks.items()}
    return {name: 1e3 * seconds for name, seconds in timing.seconds_of(calls).items()}, failed


def _best(times: Mapping[str, float]) -> str:
    """Return the fastest network; one that is not clearly faster than a simpler one does not count."""
    best = "dense"
    for name in ("fused", "sparse"):
        if times.get(name, math.inf) < _MAX_FRACTION * times[best]:
            best = name
    return best


def _row(
    name: str,
    layer: Any,
    trial: timing.Trial | None,
    reason: str,
    swaps: Mapping[str, nn.Module],
    choices: Choices,
) -> InferenceRow:
    """Return the row of a layer."""
    timed = trial is not None and trial.dense_seconds > 0
    weight = getattr(layer, "weight", None)
    size = trial.sparse_bytes / 1e6 if trial is not None and timed else None
    if trial is None and name in swaps:
        size = _megabytes(swaps[name].buffers())
    return InferenceRow(
        name,
        () if weight is None else tuple(weight.shape),
        0.0 if weight is None else 1.0 - int(weight.count_nonzero()) / max(1, weight.numel()),
        "sparse" if name in choices.sparse else "dense",
        1e3 * trial.dense_seconds if trial is not None and timed else None,
        1e3 * trial.sparse_seconds if trial is not None and timed else None,
        _megabytes(layer.parameters()),
        size,
        "" if name in choices.sparse else reason or _reason(trial),
    )


def _reason(trial: timing.Trial | None) -> str:
    """Return the reason why a layer that may be sparse stays dense."""
    if trial is None:
        return "by the given choices"
    if not trial.called:
        return _NOT_CALLED
    if trial.error:
        return f"the sparse layer fails: {trial.error}"
    return "the network as a whole became no faster" if trial.wins else "the dense layer is as fast"


def _megabytes(*tensors: Iterable[Tensor]) -> float:
    return sum(tensor.nbytes for tensor in itertools.chain(*tensors)) / 1e6

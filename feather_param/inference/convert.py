"""Convert a pruned model for faster inference on a CPU: swap the layers that are faster without their zeros."""

from __future__ import annotations

import copy
import itertools
import operator
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from feather_param.inference import kernel, timing
from feather_param.inference.report import InferenceReport, InferenceRow
from feather_param.ops.values import require_values
from feather_param.parametrizations import states_of
from feather_param.selection.names import COMPILED
from feather_param.selection.weights import LINEAR_AND_CONV
from feather_param.utils.text import printable

_FORWARDS = {name: {getattr(layer, name, None) for layer in LINEAR_AND_CONV} for name in ("forward", "_conv_forward")}
_MIN_RATE = 0.5  # below it, the column indices take more memory than the zeros, and no layer is faster
_MAX_FRACTION = 0.95  # of the dense network's time; smaller gains are within the noise of the timings
_DENSE, _SPARSE = 0, 1
_Slot = tuple[dict[str, Any], str, tuple[nn.Module, nn.Module]]
"""Where a layer is registered: its parent's children, its name among them, and the dense and the sparse layer."""


def to_sparse_inference(model: nn.Module, example_input: Any) -> tuple[nn.Module, InferenceReport]:
    """Return a copy of a pruned model that computes without zeros where that is faster, and the measurements.

    Linear and Conv layers are timed on the inputs that they get for the example, dense and sparse in turns. A layer is
    swapped for a `SparseLayer` if that takes less than 0.9 of the dense time. Then the whole network is timed. If it
    does not take less than 0.95 of the dense time, all layers stay dense.

    The outputs are those of the dense model up to rounding, also for inputs of other sizes. The choice of layers holds
    for the example's size, this machine and this number of threads (`torch.set_num_threads`). Convolutions need numba
    for most of their gain (``pip install 'feather_param[inference]'``).

    The copy is for inference on a CPU in float32. Its parameters require no gradient. It can be copied and pickled. Its
    state_dict has other keys than that of the model, so save the model (`save_sparse`) and convert it after loading.

    Args:
        model: a baked or otherwise pruned model, in eval mode. It is not changed.
        example_input: a tensor, or a tuple of arguments, as in a typical call.

    Returns:
        The copy, and a report whose ``str()`` is a table.

    Raises:
        TypeError: ``model`` is no `nn.Module` or a scripted one, or ``example_input`` is no tensor or tuple.
        ValueError: the model is sparsified, compiled, lazy or in training mode, or has no float32 Linear or Conv layer
            on the CPU.
        RuntimeError: a Parameter has no values (meta device).

    Example:
        >>> model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)).eval()
        >>> _ = nn.init.sparse_(model[0].weight, 0.99)
        >>> x = torch.randn(1, 512)
        >>> fast, report = to_sparse_inference(model, x)
        >>> torch.allclose(fast(x), model(x), atol=1e-5)
        True
    """
    from feather_param.inference.layers import SparseLayer  # imports torch's compiler, which takes a second

    arguments = _checked(model, example_input)
    fast = copy.deepcopy(model).requires_grad_(False)
    layers = {name: layer for name, layer in fast.named_modules() if isinstance(layer, LINEAR_AND_CONV)}
    reasons = {name: _unfit(layer) for name, layer in layers.items()}
    if all(reasons.values()):
        first = "".join(f"; {printable(name or 'the layer')}: {reason}" for name, reason in [*reasons.items()][:1])
        raise ValueError(f"expected a Linear or Conv layer in float32 on the CPU, got none{first}")
    require_values(fast.named_parameters())
    tried = {name: layer for name, layer in layers.items() if not reasons[name] and _rate(layer) >= _MIN_RATE}
    trials = {name: timing.Trial(layer, SparseLayer(layer)) for name, layer in tried.items()}
    holder = nn.ModuleList([fast])  # a parent for a model that is itself a layer
    with torch.no_grad():
        timing.run_trials(trials.values(), lambda: fast(*arguments))
        slots = _slots(holder, {trial.layer: trial.sparse for trial in trials.values() if trial.wins})

        def run(which: int) -> None:
            _put(slots, which)
            holder[0](*arguments)

        seconds = timing.seconds_of({"dense": lambda: run(_DENSE), "sparse": lambda: run(_SPARSE)}, 2.0)
    fraction = statistics.median(map(operator.truediv, seconds["sparse"], seconds["dense"]))
    gain = bool(slots) and fraction < _MAX_FRACTION
    _put(slots, _SPARSE if gain else _DENSE)
    rows = tuple(_row(name, layer, trials.get(name), reasons[name], gain) for name, layer in layers.items())
    report = InferenceReport(
        rows,
        dense_ms=1e3 * statistics.median(seconds["dense"]),
        sparse_ms=1e3 * statistics.median(seconds["sparse" if gain else "dense"]),
        dense_mb=_megabytes(model.parameters(), model.buffers()),
        sparse_mb=_megabytes(holder.parameters(), holder.buffers()),
        threads=torch.get_num_threads(),
        notes=() if kernel.compiled() else ("without numba (feather_param[inference]): convolutions gain less",),
    )
    return holder[0], report


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


def _unfit(layer: Any) -> str:
    """Return the reason why a layer cannot be swapped, or an empty string."""
    if is_parametrized(layer):
        return "its weight is parametrized"
    if type(layer.weight) not in (Tensor, nn.Parameter):
        return f"its weight is of type {type(layer.weight).__name__}"
    if layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
        got = f"its weight is {str(layer.weight.dtype).removeprefix('torch.')} on {layer.weight.device}"
        return f"{got}; call model.float()" if layer.weight.device.type == "cpu" else got
    if "forward" in vars(layer) or any(getattr(type(layer), n, None) not in own for n, own in _FORWARDS.items()):
        return "its forward is not torch's own"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has hooks"
    return ""


def _rate(layer: Any) -> float:
    """Return the fraction of zeros in a layer's weight."""
    return 1.0 - int(layer.weight.count_nonzero()) / max(1, layer.weight.numel())


def _slots(root: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> list[_Slot]:
    """Return the slots of the layers to swap. A layer that is registered several times has several slots."""
    return [
        (parent._modules, key, (child, swaps[child]))
        for parent in root.modules()
        for key, child in parent._modules.items()
        if child is not None and child in swaps
    ]


def _put(slots: list[_Slot], which: int) -> None:
    """Put the dense or the sparse layers into the model."""
    for modules, key, pair in slots:
        modules[key] = pair[which]


def _row(name: str, layer: Any, trial: timing.Trial | None, reason: str, gain: bool) -> InferenceRow:
    method, dense_ms, sparse_ms, sparse_mb = "dense", None, None, None
    if trial is None:
        reason = reason or "fewer than half of its weights are zero"
    elif not trial.seconds:
        reason = "its forward was not called"
    else:
        dense_ms, sparse_ms = (1e3 * trial.seconds[timed] for timed in ("dense", trial.sparse.method))
        sparse_mb = _megabytes(trial.sparse.buffers())
        if trial.wins and gain:
            method = trial.sparse.method
        elif trial.wins:
            reason = "the network as a whole became no faster"
    dense_mb = _megabytes(layer.parameters())
    return InferenceRow(
        name, tuple(layer.weight.shape), _rate(layer), method, dense_ms, sparse_ms, dense_mb, sparse_mb, reason
    )


def _megabytes(*tensors: Iterable[Tensor]) -> float:
    return sum(tensor.nbytes for tensor in itertools.chain(*tensors)) / 1e6

"""Faster inference from zeros, where it is real: every layer is timed both ways, and swapped if it wins."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from feather_param.inference import kernel as sparse_kernel
from feather_param.parametrizations import states_of
from feather_param.utils.text import aligned

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OWN_FORWARDS = {name: {getattr(layer, name, None) for layer in _LAYERS} for name in ("forward", "_conv_forward")}
_ROOT = "(the model)"  # in tables, for a layer that is the whole model and has no name
_FEWEST_ZEROS = 0.5  # with fewer, indices take more memory than the zeros did, and nothing is won
_Site = tuple[dict[str, Any], str, tuple[nn.Module, nn.Module]]  # where a layer is held: dense and sparse
_CLEARLY = 0.9  # of a dense layer's time, or what is won is within what timings vary by
_CLEARLY_IN_ALL = 0.95  # of the dense network's


@dataclass(frozen=True)
class InferenceRow:
    """One Linear or Conv layer: what it takes dense, and in the fastest sparse form that was tried, if any was."""

    name: str
    shape: tuple[int, ...]  # of its weight
    rate: float  # fraction of zeros in the weight
    way: str  # what the returned model computes: "dense", "csr" or "kernel" (see `SparseLayer`)
    dense_ms: float | None  # milliseconds of all its calls in one pass
    sparse_ms: float | None
    dense_mb: float  # megabytes (10^6 bytes) of weight and bias
    sparse_mb: float | None
    reason: str = ""  # why it stays dense


@dataclass(frozen=True)
class InferenceReport:
    """What `to_sparse_inference` measured: a row per layer, and the network as a whole, dense and as returned.

    Example:
        >>> row = InferenceRow("fc", (8, 4), 0.75, "csr", 1.0, 0.25, 0.4, 0.2)
        >>> print(InferenceReport((row,), 1.25, 0.5, 0.4, 0.2, threads=1))
        layer  shape  zeros  way  dense ms  sparse ms  gain  dense MB  sparse MB
        fc     8x4    75.0%  csr     1.000      0.250  4.0x      0.40       0.20
        all                          1.250      0.500  2.5x      0.40       0.20
        float32, CPU threads: 1
    """

    rows: tuple[InferenceRow, ...]  # the Linear and Conv layers in the model's order
    dense_ms: float  # milliseconds of the whole network for the example input
    sparse_ms: float
    dense_mb: float  # megabytes of all parameters and buffers
    sparse_mb: float
    threads: int  # `torch.get_num_threads()` at the time
    notes: tuple[str, ...] = ()  # what is good to know besides

    def __str__(self) -> str:
        cells = [["layer", "shape", "zeros", "way", "dense ms", "sparse ms", "gain", "dense MB", "sparse MB"]]
        for row in self.rows:
            figures = _figures(row.dense_ms, row.sparse_ms, row.way != "dense", row.dense_mb, row.sparse_mb)
            cells.append([row.name or _ROOT, "x".join(map(str, row.shape)), f"{row.rate:.1%}", row.way, *figures])
        figures = _figures(self.dense_ms, self.sparse_ms, bool(self.swapped), self.dense_mb, self.sparse_mb)
        lines = aligned([*cells, ["all", "", "", "", *figures]])
        lines += [f"dense: {row.name or _ROOT} ({row.reason})" for row in self.rows if row.reason]
        return "\n".join([*lines, f"float32, CPU threads: {self.threads}", *self.notes])

    @property
    def swapped(self) -> tuple[str, ...]:
        """Names of the layers that are sparse in the returned model."""
        return tuple(row.name for row in self.rows if row.way != "dense")


def to_sparse_inference(model: nn.Module, example_input: Any) -> tuple[nn.Module, InferenceReport]:
    """Return a copy of a pruned model that computes without its zeros where that is faster, and what was measured.

    Linear and Conv layers are timed on the inputs that they get for the example, dense and sparse in turns, and a layer
    is swapped for a `SparseLayer` where that takes less than 0.9 of the time. Then the network is timed as a whole; if
    it does not take less than 0.95 of the time, everything stays dense. The outputs are the dense ones up to rounding,
    for inputs of other sizes too, but what wins was measured for this one: this size, this machine, this number of
    threads (`torch.set_num_threads`). Convolutions gain most with numba (``pip install 'feather_param[inference]'``).

    The copy is for inference on a CPU in float32: its parameters ask for no gradient. It can be copied and
    pickled, but its state_dict has other keys than the model's: save the model (`save_sparse`) and convert after
    loading, for the timings hold for one machine.

    Args:
        model: a baked or otherwise pruned model, in eval mode. It is left as it is.
        example_input: the tensor, or the tuple of arguments, that a typical call gets.

    Returns:
        The copy, and a report whose ``str()`` is a table.

    Raises:
        TypeError: the model is no `nn.Module`, or the example no tensor or tuple.
        ValueError: the model is still sparsified, compiled, in training mode, or has no float32 Linear or Conv layer
            on the CPU.

    Example:
        >>> model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)).eval()
        >>> _ = nn.init.sparse_(model[0].weight, 0.99)
        >>> x = torch.randn(1, 512)
        >>> fast, report = to_sparse_inference(model, x)
        >>> torch.allclose(fast(x), model(x), atol=1e-5)
        True
    """
    from feather_param.inference.layers import SparseLayer  # with torch's compiler, which takes a second to import

    arguments = _checked(model, example_input)
    fast = copy.deepcopy(model).requires_grad_(False)
    layers = {name: layer for name, layer in fast.named_modules() if isinstance(layer, _LAYERS)}
    reasons = {name: _unfit(layer) for name, layer in layers.items()}
    if all(reasons.values()):
        first = "".join(f"; {name or 'the layer'}: {reason}" for name, reason in [*reasons.items()][:1])
        raise ValueError(f"expected a Linear or Conv layer in float32 on the CPU, got none{first}")
    tried = {name: layer for name, layer in layers.items() if not reasons[name] and _zeros(layer) >= _FEWEST_ZEROS}
    trials = {name: _Trial(layer, SparseLayer(layer)) for name, layer in tried.items()}
    holder = nn.ModuleList([fast])  # so that the model itself is a child, too, and can be swapped
    with torch.no_grad():
        _run(trials.values(), lambda: fast(*arguments))
        sites = _sites(holder, {trial.layer: trial.sparse for trial in trials.values() if trial.wins})

        def run(way: int) -> None:
            _put(sites, way)
            holder[0](*arguments)

        seconds = _seconds({"dense": lambda: run(0), "sparse": lambda: run(1)}, 2.0)
    gain = (
        bool(sites) and statistics.median(map(operator.truediv, seconds["sparse"], seconds["dense"])) < _CLEARLY_IN_ALL
    )
    _put(sites, int(gain))
    rows = tuple(_row(name, layer, trials.get(name), reasons[name], gain) for name, layer in layers.items())
    report = InferenceReport(
        rows,
        dense_ms=1e3 * statistics.median(seconds["dense"]),
        sparse_ms=1e3 * statistics.median(seconds["sparse" if gain else "dense"]),
        dense_mb=_megabytes(model.parameters(), model.buffers()),
        sparse_mb=_megabytes(holder.parameters(), holder.buffers()),
        threads=torch.get_num_threads(),
        notes=() if sparse_kernel.compiled() else ("without numba (feather_param[inference]): convolutions gain less",),
    )
    return holder[0], report


def _checked(model: Any, example_input: Any) -> tuple[Any, ...]:
    """Refuse what cannot be converted; return the arguments of a call."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"expected model to be an nn.Module that is not scripted, got {type(model).__name__}")
    if not isinstance(example_input, Tensor | tuple):
        got = type(example_input).__name__
        raise TypeError(f"expected example_input to be a tensor or a tuple of arguments, got {got}")
    if hasattr(model, "_orig_mod"):
        raise ValueError("expected a model that is not compiled; pass the one that torch.compile was given")
    if states_of(model):
        raise ValueError("expected a baked model, got one that is still sparsified; call desparsify(model) first")
    if any(map(is_lazy, model.parameters())):
        raise ValueError("expected a model whose weights have their shapes, got a lazy one; call it once first")
    for name, module in model.named_modules():
        if module.training:
            got = f"{name or 'the model'} in training mode"
            raise ValueError(f"expected a model in eval mode, got {got}; call model.eval() first")
    return example_input if isinstance(example_input, tuple) else (example_input,)


def _unfit(layer: Any) -> str:
    """Return why a layer cannot be swapped, or ""."""
    if is_parametrized(layer):
        return "its weight is parametrized"
    if type(layer.weight) not in (Tensor, nn.Parameter):
        return f"its weight is of type {type(layer.weight).__name__}"
    if layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
        got = f"its weight is {str(layer.weight.dtype).removeprefix('torch.')} on {layer.weight.device}"
        return f"{got}; call model.float()" if layer.weight.device.type == "cpu" else got
    if "forward" in vars(layer) or any(getattr(type(layer), n, None) not in own for n, own in _OWN_FORWARDS.items()):
        return "its forward is not torch's own"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has hooks"
    return ""


def _zeros(layer: Any) -> float:
    """Return the fraction of zeros in a layer's weight."""
    return 1.0 - int(layer.weight.count_nonzero()) / max(1, layer.weight.numel())


class _Trial:
    """A layer's forward that times the sparse forms, beside the dense one, on each input that the layer gets."""

    def __init__(self, layer: Any, sparse: Any) -> None:
        self.layer, self.sparse = layer, sparse
        self.seconds: dict[str, float] = {}  # of all calls

    def __call__(self, input: Tensor) -> Tensor:
        ways = ("csr", "kernel") if sparse_kernel.compiled() else ("csr",)

        def run(way: str) -> Tensor:
            self.sparse.way = way
            return self.sparse.forward(input)

        def dense() -> Tensor:
            return type(self.layer).forward(self.layer, input)

        seconds = _seconds({"dense": dense} | {way: functools.partial(run, way) for way in ways}, 0.1)
        for way, times in seconds.items():
            self.seconds[way] = self.seconds.get(way, 0.0) + statistics.median(times)
        self.sparse.way = min(ways, key=self.seconds.__getitem__)
        return dense()

    @property
    def wins(self) -> bool:
        """Whether a sparse form takes clearly less time than the dense one."""
        return bool(self.seconds) and self.seconds[self.sparse.way] < _CLEARLY * self.seconds["dense"]


def _run(trials: Iterable[_Trial], call: Callable[[], object]) -> None:
    """Call the model once with each trial as its layer's forward: a hook would switch torch's fast paths off."""
    for trial in trials:
        trial.layer.forward = trial
    try:
        call()
    finally:
        for trial in trials:
            del trial.layer.forward


def _seconds(ways: Mapping[str, Callable[[], object]], budget: float) -> dict[str, list[float]]:
    """Return the seconds of each way, which take turns: 5 to 50 rounds, as the budget of seconds allows."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()  # the first time takes longer
    end = time.perf_counter() + budget
    while (n := len(seconds["dense"])) < 5 or (n < 50 and time.perf_counter() < end):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _sites(root: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> list[_Site]:
    return [
        (parent._modules, key, (child, swaps[child]))
        for parent in root.modules()
        for key, child in parent._modules.items()
        if child is not None and child in swaps
    ]


def _put(sites: list[_Site], way: int) -> None:
    for modules, key, pair in sites:
        modules[key] = pair[way]


def _row(name: str, layer: Any, trial: _Trial | None, reason: str, gain: bool) -> InferenceRow:
    way, dense_ms, sparse_ms, sparse_mb = "dense", None, None, None
    if trial is None:
        reason = reason or "fewer than half of its weights are zero"
    elif not trial.seconds:
        reason = "its forward was not called"
    else:
        dense_ms, sparse_ms = (1e3 * trial.seconds[way] for way in ("dense", trial.sparse.way))
        sparse_mb = _megabytes(trial.sparse.buffers())
        if trial.wins and gain:
            way = trial.sparse.way
        elif trial.wins:
            reason = "the network as a whole became no faster"
    dense_mb = _megabytes(layer.parameters())
    return InferenceRow(
        name, tuple(layer.weight.shape), _zeros(layer), way, dense_ms, sparse_ms, dense_mb, sparse_mb, reason
    )


def _megabytes(*tensors: Iterable[Tensor]) -> float:
    return sum(tensor.nbytes for tensor in itertools.chain(*tensors)) / 1e6


def _figures(dense: float | None, sparse: float | None, gain: bool, mb: float, sparse_mb: float | None) -> list[str]:
    """Return the cells from dense ms to sparse MB."""
    milliseconds = ["-" if value is None else f"{value:.3f}" for value in (dense, sparse)]
    times = f"{dense / sparse:.1f}x" if gain and dense and sparse else "no gain"
    return [*milliseconds, times, *("-" if value is None else f"{value:.2f}" for value in (mb, sparse_mb))]

"""Trace a model in eval mode with torch.fx, so that the graph computes what the model computes."""

from __future__ import annotations

import copy
import inspect
import itertools
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from feather_param.inference.fusing.tracer import Tracer, Untraceable, hooked

_TRACED, _FUSED = 1e-5, 1e-3  # of the largest output: the rounding of equal steps, and of folded ones in a deep network
_LARGE_BATCH = 8  # half of it tells as much as twice of it, and is faster
_NUMERIC = (float, complex, np.ndarray, np.number)
_SEED = 7340033  # a random number that was recorded as a constant differs from those of this seed


class Recorder(fx.Interpreter):
    """Run a graph and remember the outputs' shapes and types, and which nodes change one of their inputs in place.

    Attributes:
        root: the module whose graph it is.
        outputs: of the run.
        values: the shape and dtype of each node whose output is a tensor.
        writes: the nodes that change a tensor in place.
    """

    graph: fx.Graph

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)
        self.root = root
        self.outputs: Any = None
        self.values: dict[fx.Node, tuple[torch.Size, torch.dtype]] = {}
        self.writes: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        inputs = [value for value in map(self.env.get, n.all_input_nodes) if value is not None]
        tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in tensors]
        output = super().run_node(n)
        if [tensor._version for tensor in tensors] != versions:
            self.writes.add(n)
        if isinstance(output, Tensor):
            self.values[n] = output.shape, output.dtype
        return output


def traced(model: nn.Module, arguments: tuple[Any, ...], leaf: tuple[type, ...] = ()) -> Recorder:
    """Trace a model and run the graph once.

    Arguments that the example does not give keep their defaults, and None, bools and strings keep their values. The
    graph raises a ValueError for other values. All other control flow that depends on the inputs is refused.

    Args:
        model: a model in eval mode. It is not changed.
        arguments: the positional arguments of a call.
        leaf: further classes of modules that are called, not traced.

    Returns:
        The record of a run of the graph. Its root is a copy of the model that shares its Parameters.

    Raises:
        Untraceable: there is no such graph.
    """
    if hooked(model):
        raise Untraceable("the model has hooks")
    if any(getattr(nn.modules.module, f"_global_forward{kind}hooks") for kind in ("_", "_pre_")):
        raise Untraceable("there are hooks for all modules")
    if "forward" in vars(model) or (
        type(model).__call__ is not nn.Module.__call__ and not isinstance(model, fx.GraphModule)
    ):
        raise Untraceable("its forward or __call__ was replaced")
    tracer = Tracer(_named(model, arguments), leaf)
    if tracer.is_leaf_module(model, ""):
        raise Untraceable("the model is a single layer")
    twin = _twin(model)  # tracing may set attributes
    tensors = [*twin.parameters(), *twin.buffers()]
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            recorder = Recorder(twin, tracer.trace(twin))
        for node in recorder.graph.nodes:
            if node.op == "get_attr" and isinstance(operator.attrgetter(node.target)(twin), fx.Proxy):
                raise Untraceable(f"its forward changes {node.target}")
        versions = [tensor._version for tensor in tensors]
        recorder.outputs = _outputs(recorder.run, arguments)
    except Untraceable:
        raise
    except Exception as error:
        raise Untraceable(f"it cannot be traced: {_line(error)}") from error
    if [tensor._version for tensor in tensors] != versions:
        raise Untraceable("its forward changes its Parameters or buffers")
    return recorder


def require_agreement(graph: nn.Module, model: nn.Module, arguments: tuple[Any, ...], recorded: Any) -> None:
    """Raise Untraceable unless a graph gives the model's outputs, up to rounding, also for a batch of another size.

    Args:
        graph: the rewritten graph.
        model: the model. It is not changed.
        arguments: the example.
        recorded: the outputs of the graph that was not rewritten.
    """
    model = _twin(model)  # calls may set attributes
    expected = _outputs(model, arguments)
    _require_equal(recorded, expected, _TRACED)
    _require_equal(_outputs(graph, arguments), expected, _FUSED)
    others = _of_another_size(arguments)
    try:
        expected = _outputs(model, others)
    except Exception:
        return  # the model takes no other batch
    try:
        outputs = _outputs(graph, others)
    except Exception as error:
        raise Untraceable(f"its graph holds for one batch size only: {_line(error)}") from error
    _require_equal(outputs, expected, _FUSED)


def require_same_outputs(network: nn.Module, model: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Raise Untraceable unless a network gives the model's outputs for the example, up to rounding."""
    _require_equal(_outputs(network, arguments), _outputs(_twin(model), arguments), _FUSED)


def _twin(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares its Parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _outputs(call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Return the outputs of a call on copies of tensors, which it may change in place, with fixed random numbers."""
    copies = [value.detach().clone() if isinstance(value, Tensor) else value for value in arguments]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return call(*copies)


def _require_equal(outputs: Any, expected: Any, tolerance: float) -> None:
    """Raise Untraceable unless all outputs are equal, up to a fraction of each tensor's largest value."""
    (got, form), (wanted, same_form) = pytree.tree_flatten(outputs), pytree.tree_flatten(expected)
    try:
        same = form == same_form or tolerance == _TRACED  # a Recorder's lists and dicts are those of torch.fx
        equal = same and _all_close(got, wanted, tolerance)
    except Exception as error:
        raise Untraceable(f"its outputs cannot be compared: {_line(error)}") from error
    if not equal:
        raise Untraceable("its graph gives other outputs; part of its forward is not recorded")


def _all_close(got: Sequence[Any], wanted: Sequence[Any], tolerance: float) -> bool:
    return len(got) == len(wanted) and all(map(_close, got, wanted, itertools.repeat(tolerance)))


def _close(got: Any, wanted: Any, tolerance: float) -> bool:
    """Return whether two outputs are equal. Objects are compared by their attributes, for example a cache of tensors.

    An object that has neither attributes nor an equality of its own equals any other of its type.
    """
    if got is wanted:
        return True
    if type(got) is not type(wanted):
        return False
    if isinstance(wanted, _NUMERIC):
        return _close(torch.as_tensor(got), torch.as_tensor(wanted), tolerance)
    if not isinstance(wanted, Tensor):
        if getattr(wanted, "__dict__", None):
            return _all_close(pytree.tree_leaves(vars(got)), pytree.tree_leaves(vars(wanted)), tolerance)
        return type(wanted).__eq__ is object.__eq__ or bool(got == wanted)
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    if not wanted.dtype.is_floating_point and not wanted.dtype.is_complex:
        return tolerance == _FUSED or torch.equal(got, wanted)  # rounding may change an argmax
    finite = wanted.isfinite()
    largest = float(wanted[finite].abs().max()) if bool(finite.any()) else 0.0
    return torch.allclose(got, wanted, rtol=0.0, atol=tolerance * largest, equal_nan=True)


def _of_another_size(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a batch twice as large, or half of a large one, where the first dimension is that of the first tensor."""
    batch = next((len(value) for value in arguments if isinstance(value, Tensor) and value.dim()), 0)

    def resize(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != batch:
            return value
        if batch >= _LARGE_BATCH:
            return value[: batch // 2]
        return torch.cat([value, value / 2 if value.is_floating_point() else value])

    return tuple(map(resize, arguments))


def _named(model: nn.Module, arguments: tuple[Any, ...]) -> Mapping[str, Any]:
    """Return the example's arguments by name."""
    signature = inspect.signature(type(model).forward)
    try:
        named = signature.bind(model, *arguments).arguments
    except TypeError as error:
        raise Untraceable(_line(error)) from error
    if any(signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL for name in named):
        raise Untraceable("its forward takes *args")
    return dict(itertools.islice(named.items(), 1, None))


def _line(error: Exception) -> str:
    """Return the first sentence of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]

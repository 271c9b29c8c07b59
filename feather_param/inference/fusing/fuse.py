"""Fold batch norms into Linear and Conv layers, and join each with the addition and the activation after it."""

from __future__ import annotations

import inspect
import itertools
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from feather_param.inference.fit import unfit
from feather_param.inference.fusing import nodes
from feather_param.inference.fusing.folding import Norm, folded
from feather_param.inference.fusing.tracer import Untraceable
from feather_param.inference.fusing.tracing import Recorder, require_agreement, traced
from feather_param.selection.weights import LINEAR_AND_CONV

__all__ = ["ACTIVATIONS", "FusedLayer", "finished", "fused"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu_,
    "relu6": lambda x: F.relu6(x, inplace=True),
    "silu": lambda x: F.silu(x, inplace=True),
    "hardswish": lambda x: F.hardswish(x, inplace=True),
    "gelu": F.gelu,
}
"""The activations by name. They may change their input in place. ``"gelu"`` is the exact one, with erf."""


class FusedLayer(nn.Module):
    """A Linear or Conv layer, then an optional addition, then an activation: ``activation(layer(input) + residual)``.

    Args:
        layer: the layer, with the batch norm folded into its weight and bias.
        activation: one of `ACTIVATIONS`.
        dims: the number of dimensions that the folded batch norm expects, or None for any.

    Raises:
        ValueError: the input has another number of dimensions than the folded batch norm expects.

    Example:
        >>> layer = FusedLayer(nn.Linear(2, 2), "relu")
        >>> x, residual = torch.randn(3, 2), torch.randn(3, 2)
        >>> torch.equal(layer(x, residual), torch.relu(layer.layer(x) + residual))
        True
    """

    def __init__(
        self,
        layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d,
        activation: str = "identity",
        dims: int | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"expected activation to be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.layer = layer
        self.activation = activation
        self.dims = dims

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        if self.dims is not None and input.dim() != self.dims:
            raise ValueError(f"expected an input of {self.dims} dimensions for the batch norm, got {input.dim()}")
        return finished(self.layer(input), residual, self.activation)


def finished(output: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """Return ``activation(output + residual)``. The output of a layer may be changed in place."""
    if residual is not None:
        same = residual.shape == output.shape and residual.dtype == output.dtype
        output = output.add_(residual) if same else output + residual
    return ACTIVATIONS[activation](output)


@dataclass
class _Chain:
    """A layer and the nodes after it that it will do as well."""

    nodes: list[fx.Node]
    norms: list[Norm] = field(default_factory=list)
    checks: list[fx.Node] = field(default_factory=list)  # of the number of dimensions, which FusedLayer checks
    addition: fx.Node | None = None
    residual: fx.Node | None = None
    activation: str = "identity"

    def add(self, node: fx.Node) -> fx.Node:
        self.nodes.append(node)
        return node


def fused(model: nn.Module, arguments: tuple[Any, ...], *, verify: bool = True) -> tuple[fx.GraphModule | None, str]:
    """Trace a model, fold its batch norms, and make every Linear and Conv layer a `FusedLayer`.

    A layer takes in what follows it and is computed from its output alone: batch norms, an addition of a tensor of the
    same shape, and an activation. Dropout and Identity are removed. Everything else stays as it is, at the same name.
    The graph gives the model's outputs up to rounding, also for other sizes.

    Args:
        model: a model in eval mode. It is not changed, but the result may share tensors with it.
        arguments: the positional arguments of a typical call.
        verify: whether to compare the graph's outputs with the model's. It takes some forward passes.

    Returns:
        The graph, or None if the model cannot be traced; and the reason for None.
    """
    try:
        record = traced(model, arguments, (FusedLayer,))
        graph = _Fuser(record).fuse(type(model).__name__)
        if verify:
            require_agreement(graph, model, arguments, record.outputs)
    except Untraceable as reason:
        return None, str(reason)
    return graph, ""


class _Fuser:
    """Rewrite the graph of a model."""

    def __init__(self, record: Recorder) -> None:
        self.graph, self.values, self.writes = record.graph, record.values, record.writes
        self.root = record.root
        self.modules = dict(self.root.named_modules())

    def fuse(self, name: str) -> fx.GraphModule:
        for node in self.graph.nodes:
            same = nodes.unchanged(node, self.modules)
            if same is not None:
                node.replace_all_uses_with(same)
                self.graph.erase_node(node)
        targets = self._layers()
        calls = Counter(node.target for node in self.graph.nodes if node.op == "call_module")
        members: dict[str, Any] = {}
        for node in reversed(list(self.graph.nodes)):  # the last layer before an addition takes it
            if node.target in targets and node.op == "call_module":
                chain = _Chain([node]) if calls[node.target] > 1 else self._chain(node)
                members[node.target] = self._joined(node, chain)
        for node in list(self.graph.nodes):
            if node.op == "get_attr" and not node.users:
                self.graph.erase_node(node)
            elif node.op in ("get_attr", "call_module") and node.target not in members:
                members[node.target] = operator.attrgetter(node.target)(self.root)
        try:
            return fx.GraphModule(members, self.graph, class_name=name).eval()
        except Exception as error:  # for example, it has a module of the name of an attribute of GraphModule
            raise Untraceable(f"its graph cannot be made a module: {error}") from error

    def _layers(self) -> set[str]:
        """Return the names of the layers to replace: those that nothing but their own calls uses."""
        calls = [node for node in self.graph.nodes if node.op == "call_module"]
        read = {str(node.target) for node in self.graph.nodes if node.op == "get_attr" and node.users}
        used = {self.root.get_submodule(name.rpartition(".")[0]) for name in read}  # by a tensor of theirs
        for name in {str(node.target) for node in calls} | (read & self.modules.keys()):
            used.update(itertools.islice(self.modules[name].modules(), name not in read, None))
        odd = {node.target for node in calls if nodes.only_input(node) is None}
        layers = {str(node.target): self.modules[node.target] for node in calls if node.target not in odd}
        return {
            name
            for name, layer in layers.items()
            if isinstance(layer, LINEAR_AND_CONV) and layer not in used and not unfit(layer)
        }

    def _chain(self, node: fx.Node) -> _Chain:
        """Return what follows a layer and nothing else reads."""
        chain = _Chain([node])
        layer: Any = self.modules[str(node.target)]
        dims = 2 if isinstance(layer, nn.Linear) else 2 + len(layer.kernel_size)
        checks = nodes.dims_checks(node, dims)
        after = nodes.only_user(node, checks)
        while after is not None and len(self.values[node][0]) == dims:
            norm = self._norm(after)
            if norm is None or folded(layer, [*chain.norms, norm]) is None:
                break
            chain.norms.append(norm)
            chain.add(after)
            after = nodes.only_user(after)
        if chain.norms:
            chain.checks = checks
        else:
            after = nodes.only_user(node)
        residual = after and self._residual(after, chain)
        if after and residual:
            chain.residual = residual
            chain.addition = chain.add(after)
            after = nodes.only_user(after)
        activation = after and nodes.activation(after, self.modules)
        if after and activation:
            chain.activation = activation
            chain.add(after)
        return chain

    def _joined(self, node: fx.Node, chain: _Chain) -> FusedLayer:
        """Replace a chain by one call, and return the module for it."""
        layer: Any = self.modules[str(node.target)]
        dims = len(self.values[node][0]) if chain.norms else None
        # Without an addition, the call stays where it was. With one, no node between changes its input (_residual).
        with self.graph.inserting_before(chain.addition or node):
            args = (nodes.only_input(node),) if chain.residual is None else (nodes.only_input(node), chain.residual)
            call = self.graph.call_module(str(node.target), args)
        chain.nodes[-1].replace_all_uses_with(call)
        self.values[call] = self.values[chain.nodes[-1]]
        for old in [*chain.checks, *reversed(chain.nodes)]:
            self.graph.erase_node(old)
        return FusedLayer(folded(layer, chain.norms) if chain.norms else layer, chain.activation, dims)

    def _norm(self, node: fx.Node) -> Norm | None:
        """Return a batch norm that can be folded."""
        if node.op == "call_module" and nodes.only_input(node) is not None:
            module = self.modules[str(node.target)]
            return Norm.of(module) if nodes.plain(module) else None
        if node.op != "call_function" or node.target is not F.batch_norm:
            return None
        given = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
        given.apply_defaults()
        _, mean, var, weight, bias, training, _, eps = map(self._value, given.arguments.values())
        return None if training else Norm.checked(mean, var, weight, bias, eps)

    def _value(self, argument: Any) -> Any:
        """Return a constant argument: a number, or a tensor of the model."""
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            return operator.attrgetter(str(argument.target))(self.root)
        return argument

    def _residual(self, node: fx.Node, chain: _Chain) -> fx.Node | None:
        """Return the other operand of an addition that the chain can do."""
        other = nodes.addend(node, chain.nodes[-1])
        value = self.values[chain.nodes[-1]]
        if other is None or self.values.get(other) != value or value[1] != torch.float32:
            return None
        between = chain.nodes[0].next
        while between is not node:
            if between in self.writes and between not in chain.nodes:
                return None
            between = between.next
        return other

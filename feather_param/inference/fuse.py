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
from torch.nn.utils.parametrize import is_parametrized

from feather_param.inference.fit import unfit
from feather_param.inference.folding import Norm, folded
from feather_param.inference.tracing import Recorder, Untraceable, require_agreement, traced
from feather_param.selection.weights import LINEAR_AND_CONV

__all__ = ["ACTIVATIONS", "FusedLayer", "fused"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu_,
    "relu6": lambda x: F.relu6(x, inplace=True),
    "silu": lambda x: F.silu(x, inplace=True),
    "hardswish": lambda x: F.hardswish(x, inplace=True),
    "gelu": F.gelu,
}
"""The activations by name. They may change their input in place. ``"gelu"`` is the exact one, with erf."""

_MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish", nn.GELU: "gelu"}
_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys([F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"], "relu"),
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.gelu: "gelu",
}
_ADDITIONS = {operator.add: False, torch.add: False, "add": False, operator.iadd: True, "add_": True}  # in place?
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_DROPOUT_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


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
        output = self.layer(input)
        if residual is not None:
            same = residual.shape == output.shape and residual.dtype == output.dtype
            output = output.add_(residual) if same else output + residual
        return ACTIVATIONS[self.activation](output)


@dataclass
class _Chain:
    """A layer and the nodes after it that it will do as well."""

    nodes: list[fx.Node]
    norms: list[Norm] = field(default_factory=list)
    addition: fx.Node | None = None
    residual: fx.Node | None = None
    activation: str = "identity"


def fused(model: nn.Module, arguments: tuple[Any, ...]) -> tuple[fx.GraphModule | None, str]:
    """Trace a model, fold its batch norms, and make every Linear and Conv layer a `FusedLayer`.

    A layer takes in what follows it and is computed from its output alone: batch norms, an addition of a tensor of the
    same shape, and an activation. Dropout and Identity are removed. Everything else stays as it is, at the same name.
    The graph gives the model's outputs up to rounding, also for other sizes.

    Args:
        model: a model in eval mode. It is not changed, but the result may share tensors with it.
        arguments: the positional arguments of a typical call.

    Returns:
        The graph, or None if the model cannot be traced; and the reason for None.
    """
    try:
        twin, record = traced(model, arguments, (FusedLayer,))
        graph = _Fuser(twin, record).fuse(type(model).__name__)
        require_agreement(graph, model, arguments)
    except Untraceable as reason:
        return None, str(reason)
    return graph, ""


class _Fuser:
    """Rewrite the graph of a model."""

    def __init__(self, root: nn.Module, record: Recorder) -> None:
        self.graph, self.values, self.writes = record.graph, record.values, record.writes
        self.root = root
        self.modules = dict(root.named_modules())

    def fuse(self, name: str) -> fx.GraphModule:
        for node in self.graph.nodes:
            if self._is_identity(node):
                node.replace_all_uses_with(_input(node, only=False))  # pyright: ignore[reportArgumentType]
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
        return fx.GraphModule(members, self.graph, class_name=name).eval()

    def _layers(self) -> set[str]:
        """Return the names of the layers to replace: those that nothing but their own calls uses."""
        calls = [node for node in self.graph.nodes if node.op == "call_module"]
        read = {str(node.target) for node in self.graph.nodes if node.op == "get_attr" and node.users}
        used = {self.modules[name.rpartition(".")[0]] for name in read}  # by a tensor of theirs
        for name in {str(node.target) for node in calls} | (read & self.modules.keys()):
            used.update(itertools.islice(self.modules[name].modules(), name not in read, None))
        odd = {node.target for node in calls if _input(node) is None}
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
        after = _only_user(node)
        while after is not None and len(self.values[node][0]) == dims:
            norm = self._norm(after)
            if norm is None or folded(layer, [*chain.norms, norm]) is None:
                break
            chain.norms.append(norm)
            chain.nodes.append(after)
            after = _only_user(after)
        residual = after and self._residual(after, chain)
        if residual and after:
            chain.addition, chain.residual = after, residual
            chain.nodes.append(after)
            after = _only_user(after)
        activation = after and self._activation(after, chain.nodes[-1])
        if activation and after:
            chain.activation = activation
            chain.nodes.append(after)
        return chain

    def _joined(self, node: fx.Node, chain: _Chain) -> FusedLayer:
        """Replace a chain by one call, and return the module for it."""
        layer: Any = self.modules[str(node.target)]
        dims = len(self.values[node][0]) if chain.norms else None
        # Without an addition, the call stays where it was. With one, no node between changes its input (_residual).
        with self.graph.inserting_before(chain.addition or node):
            args = (_input(node),) if chain.residual is None else (_input(node), chain.residual)
            call = self.graph.call_module(str(node.target), args)
        chain.nodes[-1].replace_all_uses_with(call)
        self.values[call] = self.values[chain.nodes[-1]]
        for old in reversed(chain.nodes):
            self.graph.erase_node(old)
        return FusedLayer(folded(layer, chain.norms) if chain.norms else layer, chain.activation, dims)

    def _norm(self, node: fx.Node) -> Norm | None:
        """Return a batch norm that can be folded."""
        if node.op == "call_module" and _input(node) is not None:
            module = self.modules[str(node.target)]
            return Norm.of(module) if _plain(module) else None
        if node.op != "call_function" or node.target is not F.batch_norm:
            return None
        given = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
        given.apply_defaults()
        _, mean, var, weight, bias, training, _, eps = map(self._value, given.arguments.values())
        return None if training else Norm.checked(mean, var, weight, bias, eps)

    def _value(self, argument: Any) -> Any:
        """Return a constant argument: a number, or a tensor of the model."""
        return operator.attrgetter(argument.target)(self.root) if _is_attribute(argument) else argument

    def _residual(self, node: fx.Node, chain: _Chain) -> fx.Node | None:
        """Return the other operand of an addition that the chain can do."""
        in_place = _ADDITIONS.get(node.target) if node.op in ("call_function", "call_method") else None
        tail, alpha = chain.nodes[-1], node.kwargs.get("alpha", 1)
        if in_place is None or len(node.args) != 2 or node.kwargs.keys() - {"alpha"} or type(alpha) is not int:
            return None
        first, second = node.args
        other = second if first is tail else first
        if alpha != 1 or not isinstance(other, fx.Node) or other is tail or (in_place and first is not tail):
            return None
        if self.values.get(other) != self.values[tail] or self.values[tail][1] != torch.float32:
            return None
        between = chain.nodes[0].next
        while between is not node:
            if between in self.writes and between not in chain.nodes:
                return None
            between = between.next
        return other

    def _activation(self, node: fx.Node, tail: fx.Node) -> str | None:
        if node.op == "call_module":
            module: Any = self.modules[str(node.target)]
            name = _MODULES.get(type(module)) if _plain(module) and _input(node) is tail else None
            return None if name == "gelu" and module.approximate != "none" else name
        if node.op not in ("call_function", "call_method") or _input(node, only=False) is not tail:
            return None
        approximate = node.kwargs.get("approximate", "none")
        return _FUNCTIONS.get(node.target) if len(node.all_input_nodes) == 1 and approximate == "none" else None

    def _is_identity(self, node: fx.Node) -> bool:
        """Return whether a node gives back its input in eval mode."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            dropout = type(module) in _DROPOUTS or type(module).__name__ == "StochasticDepth"
            identity = type(module) is nn.Identity or (dropout and not module.training)
            return identity and _plain(module) and _input(node) is not None
        if node.op != "call_function" or not isinstance(_input(node, only=False), fx.Node):
            return False
        if node.target in _DROPOUT_FUNCTIONS or getattr(node.target, "__name__", "") == "stochastic_depth":
            given = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # pyright: ignore[reportArgumentType]
            given.apply_defaults()
            return given.arguments.get("training") is False
        return False


def _plain(module: nn.Module) -> bool:
    """Return whether calling a module calls its class's forward, and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and "forward" not in vars(module) and not is_parametrized(module)


def _input(node: fx.Node, only: bool = True) -> fx.Node | None:
    """Return the first argument of a call, or None if it has others."""
    values = [*node.args, *node.kwargs.values()]
    if not values or (only and len(values) != 1) or not isinstance(values[0], fx.Node):
        return None
    return values[0] if node.args or next(iter(node.kwargs)) == "input" else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_attribute(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"

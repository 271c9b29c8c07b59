"""What the nodes of a torch.fx graph compute, for a model in eval mode."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

_MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish", nn.GELU: "gelu"}
_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys([F.relu, torch.relu, torch.relu_, "relu", "relu_"], "relu"),
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.gelu: "gelu",
}
_ADDITIONS: dict[Any, bool] = {operator.add: False, torch.add: False, "add": False, operator.iadd: True, "add_": True}
"""Whether an addition changes its first operand in place."""
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_DROPOUT_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


def plain(module: nn.Module) -> bool:
    """Return whether calling a module calls its class's forward, and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and "forward" not in vars(module) and not is_parametrized(module)


def first_input(node: fx.Node) -> fx.Node | None:
    """Return the first argument of a call, if it is a node."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, fx.Node) else None


def only_input(node: fx.Node) -> fx.Node | None:
    """Return the argument of a call that has only one."""
    return first_input(node) if len(node.args) + len(node.kwargs) == 1 else None


def only_user(node: fx.Node, ignored: Sequence[fx.Node] = ()) -> fx.Node | None:
    """Return the node that reads the output of a node, if it is the only one, not counting some."""
    users = [user for user in node.users if user not in ignored]
    return users[0] if len(users) == 1 else None


def activation(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the name of the activation that a node applies to its first input."""
    if node.op == "call_module":
        module: Any = modules[str(node.target)]
        name = _MODULES.get(type(module)) if plain(module) and only_input(node) else None
        return None if name == "gelu" and module.approximate != "none" else name
    if node.op not in ("call_function", "call_method") or node.all_input_nodes != [first_input(node)]:
        return None
    return _FUNCTIONS.get(node.target) if node.kwargs.get("approximate", "none") == "none" else None


def addend(node: fx.Node, tail: fx.Node) -> fx.Node | None:
    """Return what a node adds to a tensor, unless that changes in place what is added."""
    in_place = _ADDITIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    alpha = node.kwargs.get("alpha", 1)
    if in_place is None or len(node.args) != 2 or node.kwargs.keys() - {"alpha"} or alpha != 1:
        return None
    first, second = node.args
    if first is tail:
        return second if isinstance(second, fx.Node) and second is not tail else None
    return first if isinstance(first, fx.Node) and not in_place else None


def unchanged(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    """Return the input of a node that gives it back in eval mode: Identity, dropout, stochastic depth."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        same = type(module) is nn.Identity or (type(module) in _DROPOUTS and not module.training)
        return only_input(node) if same and plain(module) else None
    name = getattr(node.target, "__name__", "")
    if node.op == "call_function" and (node.target in _DROPOUT_FUNCTIONS or name == "stochastic_depth"):
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # pyright: ignore[reportArgumentType]
        given.apply_defaults()
        return first_input(node) if given.arguments["training"] is False else None
    return None


def dims_checks(node: fx.Node, dims: int) -> list[fx.Node]:
    """Return the nodes that only assert the number of dimensions of a node's output, the last ones first."""
    found = []
    for read in node.users:
        if read.target is not getattr or read.args[1:] != ("ndim",):
            continue
        equal = only_user(read)
        check = equal and only_user(equal)
        if not read.users:
            found.append(read)
        elif equal and equal.target is operator.eq and equal.args == (read, dims) and _asserts(check):
            found += [check, equal, read]
    return found


def _asserts(node: fx.Node | None) -> bool:
    return node is not None and node.target is torch._assert and not node.users

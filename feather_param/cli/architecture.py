"""Build a network from the arguments of ``--arch``: a function and its arguments."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from feather_param.selection.names import without_wrappers

_DDP = "module."  # the prefix of all names in the state_dict of DistributedDataParallel


def build(target: str, settings: Sequence[str] = ()) -> nn.Module:
    """Import a function or class, call it, and return the network.

    Args:
        target: ``"package.module:function"``.
        settings: arguments as ``name=value``; a value is a Python literal or text.

    Raises:
        ValueError: there is no such function, it fails, it returns no nn.Module, or a setting has no ``=``.

    Example:
        >>> build("torch.nn:Linear", ["in_features=3", "out_features=2", "bias=False"])
        Linear(in_features=3, out_features=2, bias=False)
    """
    name, _, function = target.partition(":")
    if not name or not function:
        raise ValueError(f"expected package.module:function, got {target}; for example torchvision.models:resnet50")
    arguments: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"expected arguments of {target} as name=value, got {setting}")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[key] = value
    try:
        make: Any = importlib.import_module(name)
        for part in function.split("."):
            make = getattr(make, part)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"expected {target} to be importable from here, got: {error}") from error
    try:
        model = make(**arguments)
    except Exception as error:  # the function of the user may raise anything
        call = f"{target}({', '.join(settings)})"
        raise ValueError(f"expected {call} to return an nn.Module, got {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected {target} to return an nn.Module, got {type(model).__name__}")
    return model


def load(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load a state_dict, also one of the same model in DistributedDataParallel, torch.compile or checkpoint wrappers.

    Raises:
        ValueError: it is the state_dict of another model.
    """
    tensors = {without_wrappers(name): tensor for name, tensor in tensors.items()}
    if all(name.startswith(_DDP) for name in tensors):
        tensors = {name.removeprefix(_DDP): tensor for name, tensor in tensors.items()}
    own = {without_wrappers(name): name for name in model.state_dict()}  # a part of the network may be compiled
    tensors = {own.get(name, name): tensor for name, tensor in tensors.items()}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 400 else f"{reason[:400]} ..."
        raise ValueError(f"expected the weights of this network, got others: {reason}") from error

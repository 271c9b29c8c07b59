"""Build a network from what a command line can say: where its function is, and with which arguments to call it."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

_WRAPPERS = ("module.", "_orig_mod.")  # prefixes that DDP and torch.compile put before every name


def build(place: str, settings: Sequence[str] = ()) -> nn.Module:
    """Import a function or class, and call it.

    Args:
        place: ``"package.module:function"``.
        settings: arguments as ``name=value``; values are Python literals, else text.

    Raises:
        ValueError: there is no such function, it fails or makes no nn.Module, or a setting is none.

    Example:
        >>> build("torch.nn:Linear", ["in_features=3", "out_features=2", "bias=False"])
        Linear(in_features=3, out_features=2, bias=False)
    """
    name, _, function = place.partition(":")
    if not name or not function:
        raise ValueError(f"expected package.module:function, got {place}; for example torchvision.models:resnet50")
    arguments: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"expected arguments of {place} as name=value, got {setting}")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[key] = value
    try:
        make: Any = importlib.import_module(name)
        for part in function.split("."):
            make = getattr(make, part)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"expected {place} to be importable from here, got: {error}") from error
    try:
        model = make(**arguments)
    except Exception as error:  # of the user's own function, which may raise anything
        call = f"{place}({', '.join(settings)})"
        raise ValueError(f"expected {call} to return an nn.Module, got {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected {place} to return an nn.Module, got {type(model).__name__}")
    return model


def load(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load a state_dict, also one of the same model wrapped in DDP or torch.compile.

    Raises:
        ValueError: it is of another model.
    """
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        what = " ".join(str(error).split())
        what = what if len(what) < 400 else f"{what[:400]} ..."
        raise ValueError(f"expected the weights of this network, got others: {what}") from error

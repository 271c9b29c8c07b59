"""Names of modules and tensors, with and without the parts that wrappers add."""

from __future__ import annotations

import re

from torch import nn

COMPILED = "_orig_mod"  # the attribute under which torch.compile holds the module inside
_WRAPPERS = (COMPILED, "_checkpoint_wrapped_module")  # and activation checkpointing


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return all names of each module of a model. A module that is used twice has two."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def full_name(module: str, tensor: str) -> str:
    """Return the name of a tensor of a module. The tensors of the root have names without a dot."""
    return f"{module}.{tensor}" if module else tensor


def plain_name(name: str) -> str:
    """Return the name of a parameter without wrappers and without our parametrization.

    Example:
        >>> plain_name("_orig_mod.0.parametrizations.weight.original")
        '0.weight'
    """
    return re.sub(r"(^|\.)parametrizations\.([^.]+)\.original\Z", r"\1\2", without_wrappers(name))


def without_wrappers(name: str) -> str:
    """Return a name without the parts that torch.compile and activation checkpointing add.

    Example:
        >>> without_wrappers("_orig_mod.layer.weight")
        'layer.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)

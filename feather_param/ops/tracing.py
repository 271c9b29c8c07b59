"""Whether the values of a tensor can be read: not while torch compiles, traces or transforms the code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")


def concrete(tensor: Tensor) -> bool:
    """Return whether the values of a tensor can be read in Python now.

    They cannot in compiled or traced code, under a `torch.func` transform or forward-mode differentiation. The
    values of subclasses such as DTensor cannot be read either.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    c: Any = torch._C
    wrapped = c._functorch.is_functorch_wrapped_tensor(tensor) or c._functorch.is_legacy_batchedtensor(tensor)
    modes = c._TorchDispatchModeKey.FAKE, c._TorchDispatchModeKey.PROXY
    traced = any(c._get_dispatch_mode(mode) is not None for mode in modes)
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return type(tensor) in (Tensor, nn.Parameter) and not (wrapped or traced or forward_mode)


def transformed() -> bool:
    """Return whether a `torch.func` transform is active."""
    return torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]


def eager(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that compiled code calls it eagerly, in a graph break.

    `torch.compiler.disable` does the same, but imports the compiler, which takes a second.
    """
    disabled = torch._disable_dynamo(function)  # pyright: ignore[reportPrivateImportUsage]

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return disabled(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return call

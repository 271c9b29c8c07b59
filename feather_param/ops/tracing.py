"""Functions that look at values, and so are never compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")


def eager(function: Callable[P, T]) -> Callable[P, T]:
    """Have a function run eagerly in compiled code; `torch.compiler.disable` would take a second to import."""
    disabled = torch._disable_dynamo(function)  # pyright: ignore[reportPrivateImportUsage]

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return disabled(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return call


def transformed() -> bool:
    """Return whether a `torch.func` transform is at work."""
    return torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]


def concrete(tensor: Tensor) -> bool:
    """Return whether values can be looked at here and now: no subclass, no transform, nothing that traces."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    c: Any = torch._C
    transformed = c._functorch.is_functorch_wrapped_tensor(tensor) or c._functorch.is_legacy_batchedtensor(tensor)
    modes = c._TorchDispatchModeKey.FAKE, c._TorchDispatchModeKey.PROXY
    traced = any(c._get_dispatch_mode(mode) is not None for mode in modes)
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return type(tensor) in (Tensor, nn.Parameter) and not (transformed or traced or forward_mode)

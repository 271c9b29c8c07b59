"""Libraries that only some users need, and an error that says how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["matplotlib", "numba", "safetensors_torch", "zstandard"]


def matplotlib(module: str) -> ModuleType:
    """Return a module of `matplotlib`."""
    return _import(f"matplotlib.{module}", "plot")


def numba() -> ModuleType:
    """Return `numba`."""
    return _import("numba", "inference")


def safetensors_torch() -> ModuleType:
    """Return `safetensors.torch`."""
    return _import("safetensors.torch", "files")


def zstandard() -> ModuleType:
    """Return `zstandard`."""
    return _import("zstandard", "files")


def _import(name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        library = name.partition(".")[0]
        raise ImportError(f"expected {library} to be installed: pip install 'feather_param[{extra}]'") from error

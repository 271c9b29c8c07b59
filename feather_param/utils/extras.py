"""Libraries that only some users need, and an error that says how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType

_EXTRAS = {"matplotlib": "plot", "numba": "inference", "zstandard": "files"}


def extra(name: str) -> ModuleType:
    """Import a module of an optional library; the ImportError names the extra to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        library = name.partition(".")[0]
        message = f"expected {library} to be installed: pip install 'feather_param[{_EXTRAS[library]}]'"
        raise ImportError(message) from error

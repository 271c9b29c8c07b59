"""Import of optional libraries."""

from __future__ import annotations

import importlib
from types import ModuleType

# The extra of this package that installs each library.
_EXTRAS = {"matplotlib": "plot", "numba": "inference", "zstandard": "files"}


def extra(name: str) -> ModuleType:
    """Import a module of an optional library; if it is missing, the ImportError names the extra to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        library = name.partition(".")[0]
        message = f"expected {library} to be installed: pip install 'feather_param[{_EXTRAS[library]}]'"
        raise ImportError(message) from error

"""Import of optional libraries."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

# The extra of this package that installs each library.
_EXTRAS = {
    "lightning": "integrations",
    "llvmlite": "inference",
    "matplotlib": "plot",
    "peft": "integrations",
    "pytorch-lightning": "integrations",
    "transformers": "integrations",
    "zstandard": "files",
}


def extra(name: str) -> ModuleType:
    """Import a module of an optional library; if it is missing, the ImportError names the extra to install."""
    with imports(name.partition(".")[0]):
        return importlib.import_module(name)


@contextmanager
def imports(library: str) -> Iterator[None]:
    """Let an ImportError within the context name the extra that installs a library."""
    try:
        yield
    except ImportError as error:
        message = f"expected {library} to be installed: pip install 'feather_param[{_EXTRAS[library]}]'"
        raise ImportError(message) from error

"""Train any unmodified PyTorch model to an exact global sparsity, with Feather (BMVC 2023)."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from feather_param.public import *  # noqa: F403
    from feather_param.public import __all__ as __all__
else:  # a type checker that saw __getattr__ would accept any name

    def __getattr__(name: str) -> Any:
        """Import the public names when the first of them is used (PEP 562).

        They need torch, whose import takes a second. The command runs code of its own before that.
        """
        if name == "__all__" or not name.startswith("_"):  # programs that inspect modules ask for many other names
            try:
                public = importlib.import_module("feather_param.public")
            except AttributeError as error:  # of torch, for example: the name itself is not missing
                raise ImportError(f"cannot import feather_param: {error}") from error
            globals().update({each: getattr(public, each) for each in public.__all__}, __all__=public.__all__)
            if name in globals():  # public, or a module of the package
                return globals()[name]
        raise AttributeError(f"module 'feather_param' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*importlib.import_module("feather_param.public").__all__, "__version__"]

"""Errors of reading and writing a file, and of too little memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# torch, safetensors and zstandard have no class for this error.
_NO_MEMORY = ("DefaultCPUAllocator: ", "Cannot allocate memory", "Allocation error : not enough memory")


@contextmanager
def errors_name(path: Path, *others: Path) -> Iterator[None]:
    """Set the path in the OSErrors of the body that name no file, as those of reads and writes do.

    Args:
        path: the file as the user knows it.
        *others: paths that are replaced by this one, such as that of a temporary file.

    Example:
        >>> with errors_name(Path("out.pt")):
        ...     raise OSError(28, "No space left on device")
        Traceback (most recent call last):
        OSError: [Errno 28] No space left on device: 'out.pt'
    """
    try:
        yield
    except OSError as error:
        # An error without a number has its own message, which a path would hide.
        if error.errno is None or error.filename not in (None, *map(str, others)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def errors_behind_torch() -> Iterator[None]:
    """Raise the error of a write, or of a signal, that ``torch.save`` replaced by a RuntimeError.

    Its C++ code calls the ``write`` of a file, and raises "unexpected pos" if that fails or is interrupted by Ctrl-C.

    Example:
        >>> with errors_behind_torch():
        ...     try:
        ...         raise OSError(28, "No space left on device")
        ...     finally:
        ...         raise RuntimeError("unexpected pos 704 vs 598")
        Traceback (most recent call last):
        OSError: [Errno 28] No space left on device
    """
    before = sys.exc_info()[1]  # the context of the body: an error that is being handled
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while isinstance(cause, RuntimeError) and cause is not before:
            cause = cause.__cause__ or cause.__context__
        if cause is None or cause is before:
            raise
        of_a_write = isinstance(cause, OSError) and cause.errno is not None and cause.filename is None
        if of_a_write or not isinstance(cause, Exception):
            raise cause from None
        raise


@contextmanager
def errors_of_memory() -> Iterator[None]:
    """Raise a MemoryError in place of the errors by which torch, safetensors and zstandard say the same.

    Example:
        >>> with errors_of_memory():
        ...     torch.zeros(2**60)
        Traceback (most recent call last):
        MemoryError
    """
    try:
        yield
    except Exception as error:
        if any(words in str(error) for words in _NO_MEMORY):
            raise MemoryError from error
        raise

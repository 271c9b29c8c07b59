"""Write to stdout and stderr, also where these are full or closed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from feather_param.files.errors import errors_name


def open_closed_streams() -> None:
    """Discard what is written to a stream whose file was closed before the start.

    Python has None in place of such a stream. The next file that is opened would take its number, and the C++ code of
    torch writes warnings to number 2.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def print_result(text: str, end: str = "\n") -> None:
    """Print a text on stdout. A character that its encoding does not have becomes an escape, as on stderr.

    Raises:
        OSError: it cannot be written. The error has the path ``stdout``.
    """
    with _discarded_after_an_error(sys.stdout), errors_name(Path("stdout")):
        encoding = sys.stdout.encoding or "utf-8"  # a StringIO has none
        print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)


def print_message(text: str) -> None:
    """Print a line on stderr. If it cannot be written, the exit status alone tells how the command ended."""
    with suppress(OSError), _discarded_after_an_error(sys.stderr):
        print(text, file=sys.stderr, flush=True)


@contextmanager
def _discarded_after_an_error(stream: TextIO) -> Iterator[None]:
    """Discard the rest of a stream. The interpreter writes it when it exits, and would print an error."""
    try:
        yield
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise

"""Write the result to stdout, also where it is full or closed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

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
    encoding = sys.stdout.encoding or "utf-8"  # a StringIO has none
    with errors_name(Path("stdout")):
        print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)

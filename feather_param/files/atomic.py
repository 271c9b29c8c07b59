"""Write a file completely or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing, and rename it to ``path`` at the end.

    If the body raises, the temporary file is removed and the old file stays. The temporary name is random, so several
    processes may write to one path. The content is flushed to the disk before the file is renamed. A symbolic link
    stays a link, and an existing file keeps its permissions.

    Raises:
        ValueError: the path is a folder, a device or a pipe.
        FileNotFoundError: the folder of the path does not exist.
    """
    given, path = path, Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # as root, os.replace would replace a device
        kind = "a folder" if path.is_dir() else "a device or pipe, which a file would replace"
        raise ValueError(f"expected a file or a new name, got {given}, {kind}")
    if not path.parent.is_dir():
        # If the folder of the given path exists, the path is a link into a folder that does not.
        folder = path.parent if given.parent.is_dir() else given.parent
        raise FileNotFoundError(errno.ENOENT, "expected an existing folder to write a file into", str(folder))
    temporary = path.with_name(f".feather_param-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

"""Files that are written whole or not at all."""

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
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes a path's place at the end, unless something fails: then it is removed.

    Its name is unlike any other writer's. A link goes on pointing to where it did, a file that was there keeps its
    permissions, and the content is on the disk before the name is.

    Raises:
        ValueError: there is a folder, a device or a pipe, whose place a file would take.
        FileNotFoundError: the folder is not there.
    """
    given, path = path, Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # to the administrator a device is a name like any other
        kind = "a folder" if path.is_dir() else "a device or pipe, whose place a file would take"
        raise ValueError(f"expected a file or a new name, got {given}, {kind}")
    if not path.parent.is_dir():
        folder = path.parent if given.parent.is_dir() else given.parent  # the former for a link that leads nowhere
        raise FileNotFoundError(errno.ENOENT, "expected a folder that is there, to write a file into", str(folder))
    temporary = path.with_name(f".save_sparse-{secrets.token_hex(8)}.tmp")
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

"""Write a file completely or not at all."""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
import shutil
import socket
import stat
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from feather_param.files.errors import errors_behind_torch, errors_name

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # pyright: ignore[reportAssignmentType]

# Note [Left-over files]
#
# A process that is killed while it writes leaves its temporary file. The next write into the folder removes it.
#
# A living writer holds a lock on its file (flock), and the system frees the lock of a dead one. A process removes a
# file only if it gets the lock. A writer locks its file after making it. If the file was removed in between, the writer
# makes another one. The writer closes the file after the rename, so the name exists only while the lock is held.
#
# On some network disks (Lustre, BeeGFS, NFS with nolock), a machine does not see the locks of others. So the name holds
# a checksum of the machine's name, and the file of another machine is removed only if it has not changed for a day. On
# a disk without locks, no file is removed. Windows has no flock, but removes no open file. There, each file that has
# not changed for a day is removed.
_MACHINE = f"{zlib.crc32(socket.gethostname().encode(errors='replace')):08x}"
_NAME = re.compile(r"\.feather_param-([0-9a-f]{8})-[0-9a-f]{16}\.tmp")
_DAY = 24 * 60 * 60  # seconds
_TRIES = 100


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing, and rename it to ``path`` at the end.

    If the body raises, the temporary file is removed and the old file stays. The temporary name is random, so several
    processes may write to one path. The content is flushed to the disk before the file is renamed. A symbolic link
    stays a link, and an existing file keeps its permissions. The temporary files of killed writers are removed first.

    Raises:
        ValueError: the path is a folder, a device or a pipe.
        FileNotFoundError: the folder of the path does not exist.
        OSError: the file cannot be written. The error has the path as it was given. It replaces the error that
            ``torch.save`` makes of it.
    """
    given, path = path, Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # as root, os.replace would replace a device
        kind = "a folder" if path.is_dir() else "a device or pipe, which a file would replace"
        raise ValueError(f"expected a file or a new name, got {given}, {kind}")
    if not path.parent.is_dir():
        # If the folder of the given path exists, the path is a link into a folder that does not.
        folder = path.parent if given.parent.is_dir() else given.parent
        raise FileNotFoundError(errno.ENOENT, "expected an existing folder to write a file into", str(folder))
    remove_leftovers(path.parent)
    with _temporary(path, given) as raw:
        file = io.BufferedWriter(raw)
        with errors_behind_torch():
            yield file
        file.flush()
        os.fsync(raw.fileno())
        if path.exists():
            shutil.copymode(path, raw.name)
        try:
            os.replace(raw.name, path)
        except OSError:  # Windows and some network disks rename no open file
            raw.close()
            os.replace(raw.name, path)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed writers left in a folder. See Note [Left-over files].

    What cannot be removed stays, for example a file of another user.

    Example:
        >>> import tempfile
        >>> remove_leftovers(Path(tempfile.mkdtemp()))
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if match := _NAME.fullmatch(entry.name):
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    old = time.time() - status.st_mtime > _DAY
                    if stat.S_ISREG(status.st_mode) and (old or (fcntl is not None and match[1] == _MACHINE)):
                        _remove_if_dead(entry.path)


def _remove_if_dead(path: str) -> None:
    """Remove a temporary file. Raise an OSError if its writer lives."""
    if fcntl is None:
        os.unlink(path)
        return
    with open(path, "r+b", buffering=0, opener=_open_no_link) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


@contextmanager
def _temporary(path: Path, given: Path) -> Iterator[io.FileIO]:
    """Make and lock a file with a random name beside ``path``. Remove it at the end if it was not renamed.

    Args:
        path: the file that it shall become.
        given: the path in the errors.
    """
    for _ in range(_TRIES):
        temporary = path.with_name(f".feather_param-{_MACHINE}-{secrets.token_hex(8)}.tmp")
        try:
            # A BufferedWriter in place of the FileIO would try to write once more when an error closes it.
            with errors_name(given, temporary, path), io.FileIO(str(temporary), "x") as file:
                if _lock(file):
                    yield file
                    return
        finally:
            with suppress(OSError):  # it shall not hide the error of the body
                temporary.unlink()
    raise BlockingIOError(
        errno.EAGAIN, "expected a lock on a new file, got none: others lock each; try again", str(given)
    )


def _lock(file: io.FileIO) -> bool:
    """Lock a new file until it is closed. Return False if `remove_leftovers` of another process came first."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a disk without locks, where `remove_leftovers` removes nothing
            return True
    return os.path.exists(file.name)

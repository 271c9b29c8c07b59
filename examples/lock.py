"""Keep two processes from training one run at once."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

if sys.platform != "win32":
    import fcntl


class BusyError(ValueError):
    """Another process trains the run."""


@contextmanager
def locked(checkpoint: Path) -> Iterator[None]:
    """Hold the lock of a run, which is that of the path of its checkpoint, for the length of a block.

    It is a lock of the operating system (``lockf``) on the file ``.NAME.lock`` beside the checkpoint (beside the target
    of a symbolic link), which is removed at the end. The lock ends with the process, also at a ``kill -9``. The file
    then stays until the run is resumed. Forked processes do not have the lock, so that a worker of a `DataLoader` which
    outlives its killed process does not keep it. Other machines see it through most network file systems. Where there
    are no such locks (Windows, some network file systems), the block runs without. The lock does not keep the threads
    of one process apart.

    Raises:
        BusyError: another process holds the lock.
        OSError: the file of the lock cannot be made.

    Example:
        >>> with locked(Path("runs/first/checkpoint.pt")):
        ...     train()
    """
    if sys.platform == "win32":
        yield
        return
    target = Path(os.path.realpath(checkpoint))
    path = target.with_name(f".{target.name}.lock")
    while True:
        with FileIO(path, "a+") as file:
            _lock(file, checkpoint.parent)
            if not _is_at(file, path):  # the process that held the lock before has removed the file in between
                continue
            owner = os.getpid()
            try:
                yield
            finally:
                if os.getpid() == owner:  # not a forked process that leaves the block
                    with suppress(OSError):  # the folder was removed, or is read-only now
                        path.unlink()
            return


def _lock(file: FileIO, folder: Path) -> None:
    """Lock a file, and write into it which process holds the lock."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read().decode(errors="replace") or "another process"
        raise BusyError(
            f"expected a run that no other process trains, got {folder}, which {holder} trains: stop that process, or "
            "wait for its end"
        ) from error
    except OSError:  # this file system has no locks
        return
    with suppress(OSError):  # of a full disk: the lock holds without a name
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}".encode())


def _is_at(file: FileIO, path: Path) -> bool:
    """Return whether an open file still has this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False

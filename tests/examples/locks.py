"""Processes that hold the lock of a run. They import no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOLDER = """
import os, sys, time
from pathlib import Path
from examples.lock import locked

with locked(Path(sys.argv[1])):
    worker = os.fork()
    if worker:
        print(worker, flush=True)
    time.sleep(60)
"""


def started(program: str, path: Path) -> subprocess.Popen[str]:
    """Start a program of Python with a path as its argument."""
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=root, stdout=subprocess.PIPE, text=True)


@contextmanager
def held(path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Yield a process that holds the lock of a path, and the number of a worker process that it has forked."""
    process = started(HOLDER, path)
    assert process.stdout
    worker = int(process.stdout.readline())
    try:
        yield process, worker
    finally:
        process.kill()
        os.kill(worker, signal.SIGKILL)
        process.communicate()

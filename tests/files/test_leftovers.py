"""What a killed writer leaves is removed by the next one, and nothing else is."""

from __future__ import annotations

import errno
import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from feather_param.files import atomic
from feather_param.files.atomic import atomic_write, remove_leftovers

ROOT = Path(atomic.__file__).parents[1]
posix = pytest.mark.skipif(sys.platform == "win32", reason="only POSIX has flock and SIGKILL")

# The package without torch, whose import takes seconds.
START = """
import os, random, sys, time, types
from pathlib import Path
package = types.ModuleType("feather_param")
package.__path__ = [sys.argv[1]]
sys.modules["feather_param"] = package
from feather_param.files.atomic import atomic_write
"""
WAIT = """
with atomic_write(Path("t")) as file:
    file.write(bytes(100_000))
    print(flush=True)
    time.sleep(60)
"""
# Both paths always hold one byte many times. The sizes differ, so that a writer is killed in different steps.
REPEAT = """
print(flush=True)
while True:
    with atomic_write(path := Path(random.choice("tu"))) as file:
        for _ in range(10):
            file.write(bytes([os.getpid() % 256]) * 20_000)
    content = path.read_bytes()
    assert content == content[:1] * 200_000
"""


def writer(script: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start a process that writes files, and wait until it does."""
    process = subprocess.Popen([sys.executable, "-c", START + script, ROOT], cwd=folder, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline(), "the process ended"
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    with process:
        process.kill()
    assert process.returncode == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path) -> None:
    with atomic_write(path) as file:
        file.write(b"new")


def leftover(folder: Path, machine: str = atomic._MACHINE, age: float = 0.0) -> Path:
    """Make a file as a killed writer leaves it, ``age`` seconds ago."""
    path = folder / f".feather_param-{machine}-{random.randbytes(8).hex()}.tmp"
    path.write_bytes(b"left")
    os.utime(path, (time.time() - age,) * 2)
    return path


@posix
def test_the_file_of_a_killed_writer_goes_and_that_of_a_living_one_stays(tmp_path):
    killed, living = writer(WAIT, tmp_path), writer(WAIT, tmp_path)
    assert len(names(tmp_path)) == 2
    write(tmp_path / "u")
    assert len(names(tmp_path)) == 3
    kill(killed)
    write(tmp_path / "u")
    assert len(names(tmp_path)) == 2
    kill(living)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["u"]


@posix
def test_writers_that_are_killed_at_any_moment_disturb_no_others(tmp_path):
    """A writer that lives fails only if its file was removed, or if a path has part of a content."""
    writers = [writer(REPEAT, tmp_path) for _ in range(3)]
    generator = random.Random(0)
    end = time.monotonic() + 2
    try:
        while time.monotonic() < end:
            time.sleep(generator.uniform(0, 0.04))
            kill(writers.pop(0))
            writers.append(writer(REPEAT, tmp_path))
    finally:
        for each in writers:
            kill(each)
    remove_leftovers(tmp_path)
    assert set(names(tmp_path)) <= {"t", "u"}
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        assert content == content[:1] * 200_000


@posix
def test_only_files_with_such_a_name_are_removed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"old")
    name = leftover(tmp_path).name
    others = [
        name.upper(),
        f"{name}~",
        name.removesuffix(".tmp"),
        name.replace("feather_param", "save_sparse"),
        "a.tmp",
    ]
    for other in others:
        (tmp_path / other).touch()
    (tmp_path / name.replace("-", "-0", 1)).touch()
    kept = names(tmp_path)
    kept.remove(name)
    kinds = [leftover(tmp_path) for _ in range(3)]
    for path in kinds:
        path.unlink()
    kinds[0].symlink_to(victim)
    kinds[1].mkdir()
    os.mkfifo(kinds[2])
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*kept, *(path.name for path in kinds)])
    assert victim.read_bytes() == b"old"


@posix
def test_the_file_of_another_machine_goes_after_a_day(tmp_path):
    """The locks of some network disks are not seen by other machines."""
    young, _ = leftover(tmp_path, "0" * 8, 23 * 3600), leftover(tmp_path, "0" * 8, 25 * 3600)
    write(tmp_path / "t")
    assert names(tmp_path) == [young.name, "t"]


@posix
def test_on_a_disk_without_locks_files_are_written_and_none_is_removed(tmp_path, monkeypatch):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(atomic.fcntl, "flock", unsupported)
    left = leftover(tmp_path)
    write(tmp_path / "t")
    assert names(tmp_path) == [left.name, "t"]


def test_without_flock_the_file_goes_after_a_day(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "fcntl", None)  # as on Windows
    young, _ = leftover(tmp_path), leftover(tmp_path, age=25 * 3600)
    write(tmp_path / "t")
    assert names(tmp_path) == [young.name, "t"]


def test_a_disk_that_renames_no_open_file(tmp_path, monkeypatch):
    opened, replace = [], os.replace

    class File(io.FileIO):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            opened.append(self)

    def refuse(old, new):
        if not opened[-1].closed:
            raise PermissionError(errno.EACCES, "The process cannot access the file", old)
        replace(old, new)

    monkeypatch.setattr(io, "FileIO", File)
    monkeypatch.setattr(os, "replace", refuse)
    write(tmp_path / "t")
    assert names(tmp_path) == ["t"]


@posix
def test_a_writer_takes_a_new_name_if_its_new_file_was_removed_or_locked(tmp_path, monkeypatch):
    """Another process may come between the making of a file and its lock."""
    flock, calls = atomic.fcntl.flock, []

    def late(file, operation):
        calls.append(file)
        if len(calls) == 1:
            os.unlink(file.name)
        if len(calls) == 2:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        flock(file, operation)

    monkeypatch.setattr(atomic.fcntl, "flock", late)
    write(tmp_path / "t")
    assert len(calls) == 3
    assert names(tmp_path) == ["t"]


@posix
def test_a_folder_in_which_each_new_file_is_locked_is_an_error(tmp_path, monkeypatch):
    def locked(*_: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(atomic.fcntl, "flock", locked)
    with pytest.raises(BlockingIOError, match=r"expected a lock on a new file, .*; try again: '.*t'"):
        write(tmp_path / "t")
    assert not names(tmp_path)


def test_a_folder_that_cannot_be_listed_is_no_error(tmp_path):
    remove_leftovers(tmp_path / "nowhere")

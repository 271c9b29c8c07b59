"""A file is written completely or not at all."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from feather_param import load_sparse, save_sparse
from feather_param.files import atomic, errors
from feather_param.files.atomic import atomic_write


def failing(error: BaseException):
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


FULL = (errno.ENOSPC, "No space left on device")
WRITES = {
    "torch": lambda file: torch.save({"w": torch.ones(10_000)}, file),
    "large": lambda file: file.write(bytes(100_000)),
    "small": lambda file: file.write(b"new"),  # it is written at the end
}


class FullDisk(io.FileIO):
    def write(self, content: Any) -> int:
        raise OSError(*FULL)


FAULTS = {
    "open": (io, "FileIO", lambda path, mode: failing(OSError(*FULL, path))()),
    "write": (io, "FileIO", FullDisk),
    "fsync": (os, "fsync", failing(OSError(*FULL))),
    "permissions": (shutil, "copymode", lambda old, new: failing(OSError(*FULL, new))()),
    "rename": (os, "replace", lambda old, new: failing(OSError(*FULL, old, None, new))()),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("write", WRITES)
def test_an_error_of_each_step_has_its_number_and_the_path_as_given(fault, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old").write_bytes(b"old")
    if sys.platform != "win32":
        Path("link").symlink_to("old")
    before = sorted(Path().iterdir())
    for path in [*before, *([Path("new")] if fault != "permissions" else [])]:  # a new file gets none of an old one
        with monkeypatch.context() as patch:
            patch.setattr(*FAULTS[fault])
            with pytest.raises(OSError, match=FULL[1]) as caught, atomic_write(path) as file:
                WRITES[write](file)
        error = caught.value
        assert (error.errno, error.filename, error.filename2) == (errno.ENOSPC, str(path), None)
        assert sorted(Path().iterdir()) == before
        assert Path("old").read_bytes() == b"old"


def test_errors_of_other_files_and_other_errors_stay(tmp_path):
    for error in (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "font.ttf"),
        OSError("encoder error"),
        RuntimeError("out of memory"),
        ValueError("no figure"),
    ):
        with pytest.raises(type(error)) as caught, atomic_write(tmp_path / "t"):
            raise error
        assert caught.value is error
        with pytest.raises(RuntimeError, match="no picture"), atomic_write(tmp_path / "t"):
            raise RuntimeError("no picture") from (None if isinstance(error, RuntimeError) else error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_a_signal_during_torch_save_raises_its_own_error(error, tmp_path):
    """The C++ code of torch raises a RuntimeError of its own."""

    class Interrupted:
        def __init__(self, file):
            self.write = lambda content: failing(error)() if len(content) > 1000 else file.write(content)

    with pytest.raises(type(error)) as caught, atomic_write(tmp_path / "t") as file:
        torch.save({"w": torch.ones(10_000)}, Interrupted(file))
    assert caught.value is error
    try:
        raise error
    except BaseException:  # of a signal that came before
        with pytest.raises(RuntimeError, match="another"), atomic_write(tmp_path / "t"):
            raise RuntimeError("another") from None
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file that is closed a bit later
def test_an_interruption_at_any_line_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "t"
    path.write_bytes(b"old")
    files = {module.__file__ for module in (atomic, errors)}
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename not in files:
            return None
        lines += event == "line"
        if event == "line" and lines == last:
            raise KeyboardInterrupt
        return trace

    before, last = sys.gettrace(), 0
    while last <= lines:
        last, lines = last + 1, 0
        with suppress(KeyboardInterrupt):
            sys.settrace(trace)
            try:
                with atomic_write(path) as file:
                    file.write(b"new")
            finally:
                sys.settrace(before)
        assert list(tmp_path.iterdir()) == [path], f"line {last}"
        assert path.read_bytes() in (b"old", b"new")
    assert last > 30
    assert path.read_bytes() == b"new"


def test_the_error_names_a_missing_folder_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected an existing folder to write a file into: 'nowhere'"):
        save_sparse({"t": torch.zeros(3)}, "nowhere/t")
    (tmp_path / "link").symlink_to("gone/t")
    with pytest.raises(FileNotFoundError, match=r"write a file into: '.*gone'"):
        save_sparse({"t": torch.zeros(3)}, "link")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.skipif(sys.platform == "win32", reason="only POSIX has named pipes and links")
def test_folders_devices_and_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(ValueError, match=rf"expected a file or a new name, got .*{name}, a device or pipe"):
            save_sparse({"t": torch.zeros(3)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"expected a file or a new name, got .*, a folder"):
        save_sparse({"t": torch.zeros(3)}, tmp_path)
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


@pytest.mark.skipif(sys.platform == "win32", reason="only POSIX has permissions and links")
def test_permissions_and_links_stay(tmp_path):
    old = os.umask(0o027)
    try:
        save_sparse({"t": torch.ones(3)}, tmp_path / "t")
    finally:
        os.umask(old)
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o640
    (tmp_path / "t").chmod(0o604)
    (tmp_path / "link").symlink_to("t")
    save_sparse({"t": torch.zeros(3)}, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o604
    assert not load_sparse(tmp_path / "t")["t"].any()


def test_many_writers_of_one_file(tmp_path):
    """The file is complete at any moment, whichever process writes last."""
    states = [{"t": torch.full((10_000,), float(i + 1))} for i in range(4)]
    save_sparse(states[0], tmp_path / "t")
    failed: list[BaseException] = []

    def write(state):
        try:
            for _ in range(25):
                save_sparse(state, tmp_path / "t")
                assert load_sparse(tmp_path / "t")["t"].unique().numel() == 1
        except BaseException as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(state,)) for state in states]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failed
    assert [path.name for path in tmp_path.iterdir()] == ["t"]

"""A run is trained by one process at a time, and the lock ends with its process."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fcntl")

from examples import cifar100, run_log, script
from examples.lock import BusyError, locked
from examples.processes import Processes
from examples.resumable import UserError
from examples.stop import StopRequest
from tests.examples.locks import held, started
from tests.examples.runs import TINY, Picture, only, tiny

COUNTER = """
import sys
from pathlib import Path
from examples.lock import BusyError, locked

path, left = Path(sys.argv[1]), 50
while left:
    try:
        with locked(path):
            path.write_text(str(int(path.read_text()) + 1))
            left -= 1
    except BusyError:
        pass
"""
FORK = """
import os, sys
from pathlib import Path
from examples.lock import locked

path = Path(sys.argv[1])
with locked(path):
    if worker := os.fork():
        os.waitpid(worker, 0)
        print(os.listdir(path.parent))
"""


def test_a_run_that_another_process_trains_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs" / "first" / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_log, "draw", Picture)
    monkeypatch.setitem(cifar100.NETWORKS, "tiny", tiny)
    assert cifar100.main([*TINY, "--model", "tiny", "--epochs", "1", "--sname", "new"]) == 0  # has a lock of its own
    saved = only(tmp_path, "runs/*_new/checkpoint.pt").read_bytes()
    path.write_bytes(saved)
    with held(path) as (process, worker):
        capsys.readouterr()
        assert cifar100.main(["--resume", str(path.parent)]) == 2
        out, error = capsys.readouterr()
        assert not out
        assert error == (
            f"cifar100.py: error: expected a run that no other process trains, got {path.parent}, which process "
            f"{process.pid} on {os.uname().nodename} trains: stop that process, or wait for its end\n"
        )
        assert path.read_bytes() == saved
        assert {entry.name for entry in path.parent.iterdir()} == {"checkpoint.pt", ".checkpoint.pt.lock"}
        process.kill()
        process.wait()
        os.kill(worker, 0)  # the worker lives, and does not keep the lock
        assert cifar100.main(["--resume", str(path.parent)]) == 0
        assert not list(path.parent.glob(".*"))


def test_only_one_process_at_a_time_holds_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "count"
    path.write_text("0")
    processes = [started(COUNTER, path) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    for process in processes:
        process.communicate()
    assert path.read_text() == "150"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_has_the_lock_of_its_checkpoint(tmp_path: Path) -> None:
    path, link = tmp_path / "checkpoint.pt", tmp_path / "link.pt"
    path.touch()
    link.symlink_to(path)
    with held(path), pytest.raises(BusyError), locked(link):
        pass


def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    with locked(tmp_path / "checkpoint.pt"), locked(tmp_path / "checkpoint.pt"):
        pass
    assert not list(tmp_path.iterdir())


def test_all_processes_of_a_busy_run_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "any", lambda self, here: True)  # the first process has not got the lock
    options = SimpleNamespace(resume=tmp_path / "checkpoint.pt")
    training = SimpleNamespace(options=options, processes=Processes(rank=1, count=2))
    with pytest.raises(UserError), script.run_log(training, tmp_path, "cifar100.py", "digits", StopRequest()):
        pass


def test_a_forked_process_that_leaves_the_block_leaves_the_lock(tmp_path: Path) -> None:
    process = started(FORK, tmp_path / "checkpoint.pt")
    assert process.communicate(timeout=60)[0] == "['.checkpoint.pt.lock']\n"


def test_the_lock_of_a_process_is_released_at_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "checkpoint.pt"):
        raise KeyError
    assert not list(tmp_path.iterdir())

"""Operations on files fail, each in turn: a script ends with one sentence, and the resumed run ends like another."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from examples import cifar100, events, run_log
from examples.script import reason
from tests.examples.runs import TINY, Picture, content, equal, only, tiny

FILES = {"checkpoint.pt", "config.json", "models", "results.json", "summary.png"}
NAMES = {
    "open": FILES,
    "write": FILES,
    "flush": FILES,
    "rename": FILES,
    "event": {"events"},
    "folder": {"models", "runs"},
}


class Disk:
    """Counts the operations on files of each kind, and lets them fail.

    Args:
        patch: replaces the functions of the operations.

    Attributes:
        counts: the number of operations since the last `fail`.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.fail()
        disk = self

        class File(io.FileIO):
            def __init__(self, path: str, mode: str) -> None:
                if mode == "x":  # a new file
                    disk.use("open", path)
                super().__init__(path, mode)

            def write(self, content: Any) -> int:
                write = super().write
                disk.use("write", torn=lambda: write(memoryview(content)[: len(content) // 2]))
                return write(content)

        class Records(events.RecordWriter):
            def write(self, data: bytes) -> None:
                disk.use("event", torn=lambda: self._writer.write(data[: len(data) // 2]))
                super().write(data)

        def replace(source: str, target: Path, rename: Callable[..., None] = os.replace) -> None:
            self.use("rename", source)
            rename(source, target)

        def mkdir(path: Path, *mode: int, make: Callable[..., None] = os.mkdir) -> None:
            if not path.exists():
                self.use("folder", str(path))
            make(path, *mode)

        patch.setattr(io, "FileIO", File)
        patch.setattr(events, "RecordWriter", Records)
        patch.setattr(os, "fsync", lambda _: self.use("flush"))
        patch.setattr(os, "replace", replace)
        patch.setattr(os, "mkdir", mkdir)

    def fail(self, kind: str = "", number: int = 0) -> None:
        """Count from 0, and let the operations of this kind fail from this number on."""
        self.counts: Counter[str] = Counter()
        self._kind, self._number = kind, number

    def use(self, kind: str, name: str | None = None, torn: Callable[[], object] = lambda: None) -> None:
        """Count an operation. If it is to fail, write a part of the content and raise the error."""
        self.counts[kind] += 1
        if kind == self._kind and self.counts[kind] >= self._number:
            torn()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)


def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def fails(script: ModuleType, arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Run a script that fails, and return its sentence after the name: up to the first colon, and the rest."""
    capsys.readouterr()
    assert script.main(arguments) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (sentence,) = re.findall(rf"^{script.PROGRAM}: failed: (.*)$", error, re.MULTILINE)
    name, _, rest = sentence.partition(": ")
    return name, rest


def test_only_a_full_disk_asks_for_space() -> None:
    assert reason(OSError(errno.EROFS, "Read-only file system", "a.pt")) == "a.pt: Read-only file system"
    assert reason(OSError(errno.EDQUOT, "Quota exceeded", "a.pt")) == "a.pt: Quota exceeded; free some space"


@pytest.mark.parametrize("kind", NAMES)
def test_an_operation_that_fails_is_one_sentence_and_the_run_goes_on(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_log, "draw", Picture)
    monkeypatch.setitem(cifar100.NETWORKS, "tiny", tiny)
    disk = Disk(monkeypatch)
    script, arguments = cifar100, [*TINY, "--model", "tiny", "--epochs", "2"]
    whole = inside(tmp_path / "whole", monkeypatch)
    disk.fail()
    assert script.main(arguments) == 0
    expected, count = content(whole, only(whole, "runs/*")), disk.counts[kind]
    names = set()
    for number in range(1, count + 1, 10 if kind == "event" else 1):
        folder = inside(tmp_path / str(number), monkeypatch)
        disk.fail(kind, number)
        name, rest = fails(script, arguments, capsys)
        names.add(re.sub(r"^runs/[^/]*/|(?<=models)/.*|(?<=runs)/[^/]*$|\.out.*", "", Path(name).as_posix()))
        saved = list(Path("runs").glob("*/checkpoint.pt"))
        to_go_on = [f"; to go on: python {sys.argv[0]} --resume '{path}'" for path in saved]
        assert rest == "".join(["No space left on device; free some space", *to_go_on])
        assert not list(Path().glob("**/.*"))  # no temporary file, and no lock
        disk.fail()
        assert script.main(["--resume", str(saved[0])] if saved else [*arguments, "--sname", "again"]) == 0
        ended = content(folder, only(folder, "runs/*" if saved else "runs/*_again"))
        assert all(equal(ended[name], value) for name, value in expected.items()), (kind, number)
    assert names == NAMES[kind]

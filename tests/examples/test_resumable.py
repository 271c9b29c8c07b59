"""Files are written whole, and folders are new."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from examples import resumable
from examples.resumable import new_folder, save


class Noon:
    """A clock that stands still."""

    @staticmethod
    def now() -> datetime:
        return datetime(2026, 1, 1, 12)


def test_a_second_folder_of_the_same_name_gets_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable, "datetime", Noon)
    folders = [new_folder(tmp_path / "runs", "run") for _ in range(3)]
    assert [folder.name for folder in folders] == [f"2026-01-01_12-00-00_run{end}" for end in ("", "-2", "-3")]
    assert all(folder.is_dir() for folder in folders)


def test_saving_never_leaves_a_partly_written_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.pt"
    save({"a": 1}, path)

    def torn(content: object, target: BinaryIO) -> None:
        target.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        save({"a": 2}, path)
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]

"""Checkpoints in files of a limited size, as a machine may give back no larger ones."""

from __future__ import annotations

from pathlib import Path

from feather_param.files.atomic import atomic_write

__all__ = ["join", "split"]

_BYTES = 15 * 2**20
_MARK = ".part"


def split(folder: Path, size: int = _BYTES) -> None:
    """Replace each checkpoint of a folder that is larger by its parts, ``<name>.part0`` and so on."""
    for path in folder.glob("*.checkpoint.pt"):
        content = path.read_bytes()
        if len(content) > size:
            for i, start in enumerate(range(0, len(content), size)):
                with atomic_write(path.with_name(f"{path.name}{_MARK}{i}")) as file:
                    file.write(content[start : start + size])
            path.unlink()


def join(folder: Path) -> None:
    """Replace the parts of each checkpoint of a folder by the checkpoint."""
    for first in folder.glob(f"*{_MARK}0"):
        name = first.name.removesuffix(f"{_MARK}0")
        parts = sorted(folder.glob(f"{name}{_MARK}*"), key=lambda path: int(path.name.rpartition(_MARK)[2]))
        with atomic_write(folder / name) as file:
            for part in parts:
                file.write(part.read_bytes())
        for part in parts:
            part.unlink()

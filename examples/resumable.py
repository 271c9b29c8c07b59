"""What makes a training script safe to interrupt: checkpoints, and options that they keep."""

from __future__ import annotations

import argparse
import operator
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from feather_param.files.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_VERSION = 3
_KEYS = {"settings", "training", "log"}
_COMPARISONS = {"at least": operator.ge, "above": operator.gt, "below": operator.lt}


class UserError(Exception):
    """An error that the user can correct. The message is one sentence that says how."""


def save(content: Any, path: Path) -> None:
    """Save with ``torch.save``. The path holds either the old content or the new, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        torch.save(content, file)


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file. The path holds either the old picture or the new, never a part of it."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def save_checkpoint(path: Path, program: str, content: Mapping[str, Any]) -> None:
    """Save settings, training and log of a run of a script, for example ``cifar100.py``."""
    save({"format": _format(program), "version": _VERSION, **content}, path)


def load_checkpoint(path: Path, program: str) -> dict[str, Any]:
    """Return the content of a file that `save_checkpoint` wrote for a script: settings, training and log.

    Raises:
        UserError: the file is missing, damaged or not a checkpoint of the script.
    """
    if not path.is_file():
        raise UserError(
            f"expected --resume to name a checkpoint file or the folder of a run, got {path}, which does not exist; "
            "a run that was killed before its first epoch ended has no checkpoint: start a new one"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file may raise errors of pickle, of zip or of the operating system, and others.
    except Exception as error:
        raise UserError(
            f"expected --resume to name a checkpoint, got {path}, which is damaged or something else "
            f"({type(error).__name__})"
        ) from error
    if (
        not isinstance(checkpoint, dict)
        or checkpoint.get("format") != _format(program)
        or not checkpoint.keys() >= _KEYS
    ):
        raise UserError(f"expected --resume to name a checkpoint of this script, got {path}, a file of another program")
    if checkpoint.get("version") != _VERSION:
        raise UserError(
            f"expected a checkpoint of version {_VERSION}, got version {checkpoint.get('version')} in {path}: "
            "resume it with the release that wrote it"
        )
    return checkpoint


def _format(program: str) -> str:
    return f"feather_param/examples/{program.removesuffix('.py')}"


class Parser(argparse.ArgumentParser):
    """A parser that raises a `UserError` for a wrong option, and reads the options of a run to resume.

    Args:
        free: names of the options that a resumed run may change.
        prog: name of the program.
        description: text of the help.
    """

    def __init__(self, free: Sequence[str], prog: str, description: str | None) -> None:
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.free = free
        self._ranges: dict[str, dict[str, float]] = {}

    def option(
        self, name: str, default: Any, help: str, range: dict[str, float] | None = None, **keywords: Any
    ) -> None:
        """Add an option. A default of False makes it a flag; the type of another default is that of the option.

        Its value has to be in the range, for example ``{"at least": 0, "below": 1}``.
        """
        if default is False:
            keywords = {"action": "store_true"}
        elif default is not None:
            keywords = {"type": type(default), "default": default, **keywords}
            help += " (%(default)s)"
        self.add_argument(name, help=help, **keywords)
        self._ranges[name] = range or {}

    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def parse_resumable(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse a command line. With --resume, the checkpoint gives the options that the command line leaves out.

        Raises:
            UserError: an option is unknown, out of its range, or differs from the checkpoint and is not free.
        """
        options = self.parse_args(argv)
        if options.resume is not None:
            path = Path(options.resume)
            path = path / "checkpoint.pt" if path.is_dir() else path
            saved = load_checkpoint(path, self.prog)["settings"]
            if saved.keys() != settings(options).keys():
                raise UserError("expected the settings of this script in the checkpoint, got those of another version")
            self.set_defaults(**saved)
            options = self.parse_args(argv)
            for name, value in settings(options).items():
                if name not in self.free and value != saved[name]:
                    raise UserError(
                        f"expected --{name.replace('_', '-')} to be {saved[name]} as in the run to resume, got "
                        f"{value}: leave the option out, or start a new run"
                    )
            options.resume = path
        for name, range in self._ranges.items():
            value = getattr(options, name.removeprefix("--").replace("-", "_"))
            if value is not None and not all(_COMPARISONS[word](value, bound) for word, bound in range.items()):
                expected = " and ".join(f"{word} {bound}" for word, bound in range.items())
                raise UserError(f"expected {name} to be {expected}, got {value}")
        return options


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return all options except --resume."""
    return {name: value for name, value in vars(options).items() if name != "resume"}


def new_folder(parent: Path, name: str) -> Path:
    """Make and return the folder ``<datetime>_<name>``. If it exists already, append a number."""
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{name}"
    for count in range(1, 1000):
        folder = parent / (name if count == 1 else f"{name}-{count}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{parent / name} and 998 folders with a number appended exist")

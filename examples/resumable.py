"""Checkpoints of the training script, and requests to stop."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from examples.settings import UserError

__all__ = ["StopRequest", "load_checkpoint", "make_checkpoint"]

_FORMAT = "feather_param/examples/cifar100"
_VERSION = 1
_KEYS = {"settings", "training", "log"}


def make_checkpoint(settings: dict[str, Any], training: dict[str, Any], log: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint file: the run's settings, and the states of its training and its log."""
    return {"format": _FORMAT, "version": _VERSION, "settings": settings, "training": training, "log": log}


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `make_checkpoint` made, from a file.

    Raises:
        UserError: the file is missing, damaged, or of another program.
    """
    if not path.is_file():
        raise UserError(
            f"expected --resume to name a checkpoint file or the folder of a run, got {path}, which is none; a run "
            "that was killed before its first epoch ended has none"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    # What a damaged file raises depends on where the damage is: pickle, zip or io errors, and others.
    except Exception as error:
        raise UserError(
            f"expected --resume to name a checkpoint, got {path}, which is damaged or something else "
            f"({type(error).__name__})"
        ) from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != _FORMAT or not checkpoint.keys() >= _KEYS:
        raise UserError(f"expected --resume to name a checkpoint of this script, got {path}, a file of another program")
    if checkpoint.get("version") != _VERSION:
        raise UserError(
            f"expected a checkpoint of version {_VERSION}, got version {checkpoint.get('version')} in {path}: "
            "resume it with the release that wrote it"
        )
    return checkpoint


class StopRequest:
    """Notes SIGINT (Ctrl-C) and SIGTERM while it is entered, instead of letting them end the program.

    A second signal has its usual effect. Outside the main thread, where Python allows no signal handlers, it
    does nothing.

    Attributes:
        signal: the signal that came; None while there was none.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

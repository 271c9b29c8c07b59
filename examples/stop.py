"""Stop a training on request, after it has saved a checkpoint."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

from feather_param.utils.signals import EndOnSignal


class Stopped(Exception):
    """The run stopped on request, after it saved a checkpoint."""


class StopRequest(EndOnSignal):
    """Record SIGINT (Ctrl-C), SIGTERM or SIGHUP instead of ending the program, inside a ``with`` block.

    A second SIGINT or SIGTERM raises `Signalled`, which ends the program without another checkpoint. A second SIGHUP
    does not: a shell and the system each send one when a terminal is closed. Nor does any second signal under
    `torchrun`: it passes on a Ctrl-C that the processes of the terminal have received already, and kills them after
    30 seconds.

    Attributes:
        signal: the last signal received, or None.
        checkpoint: where the run saves its checkpoints. The script sets it once it is known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.signal: signal.Signals | None = None
        self.checkpoint: Path | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Record the first signal, and end by the next one."""
        first, received = self.signal is None, signal.Signals(number)
        if first or "TORCHELASTIC_RUN_ID" in os.environ:
            self.signal = received
        elif received.name != "SIGHUP":
            super().receive(number, frame)

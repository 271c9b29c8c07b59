"""End a program when a signal comes: SIGINT (Ctrl-C), SIGTERM, or SIGHUP (its terminal is closed). Imports no torch."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TextIO

_WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
_NUMBERS = [signal.Signals[name] for name in _WORDS if name in signal.Signals.__members__]  # Windows has no SIGHUP
_PATIENCE = 5.0  # seconds that a clean-up may take before another signal ends the process


class Signalled(KeyboardInterrupt):
    """A signal ends the program.

    Attributes:
        status: the exit status, 128 + the number of the signal, as shells have it.
        time: when the signal came, by ``time.monotonic()``.
    """

    def __init__(self, number: int) -> None:
        super().__init__(_WORDS[signal.Signals(number).name])
        self.status = 128 + number
        self.time = time.monotonic()


class EndOnSignal:
    """Raise `Signalled` when a signal comes inside a ``with`` block, so that the program removes temporary files.

    The exception leaves the block even if other code has replaced it, as ``torch.save`` does. Further signals of the
    next 5 seconds do not disturb the code that cleans up. A later one ends the process, or raises again if other code
    has lost the exception. A signal that was ignored before stays ignored (nohup). Outside the main thread, where
    Python allows no handlers, the block changes nothing.
    """

    def __init__(self) -> None:
        self._error: Signalled | None = None
        self._inside = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Any:
        self._error, self._inside = None, True
        try:
            for number in _NUMBERS:
                previous = signal.getsignal(number)
                if previous not in (signal.SIG_IGN, None):  # None: a handler that is not of Python
                    self._previous[number] = previous
                    signal.signal(number, self.receive)
        except ValueError:  # not the main thread
            self._previous.clear()
        except Signalled:
            self._restore()
            raise
        return self

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        in_flight = _in_flight()
        earlier = in_flight or self._error  # a destructor that cleans up does not see what is in flight
        if earlier is not None and time.monotonic() - earlier.time <= _PATIENCE:
            return
        if in_flight is not None:
            os._exit(128 + number)
        self._error = Signalled(number)
        if self._inside:
            raise self._error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside = False
        self._restore()
        if self._error is not None and self._error is not error:
            raise self._error from None

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


def _in_flight() -> Signalled | None:
    """Return the `Signalled` that is being handled: by an ``except``, a ``finally`` or the end of a ``with`` block."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, Signalled):
        error = error.__context__
    return error


def end_at_once() -> None:
    """From here on, end the program with status 130 on Ctrl-C. Call it before the import of torch, which takes seconds.

    An import may lose an exception, or raise another one. SIGTERM and SIGHUP end a program at once without this.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))


def exit_status(program: str, main: Callable[[], int]) -> int:
    """Run a program and return its exit status, also if a signal ends it."""
    try:
        with EndOnSignal():
            return main()
    except Signalled as error:
        last_words(f"{program}: {error}")
        return error.status


def last_words(text: str, stream: TextIO | None = None) -> None:
    """Print a line (on stderr) near the end of the program. Nobody may be able to read it, as after SIGHUP."""
    with contextlib.suppress(OSError):
        print(text, file=stream or sys.stderr, flush=True)
    discard_unwritten()


def discard_unwritten() -> None:
    """Discard what stdout and stderr cannot write. The interpreter would try it again, and change the exit status."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # Python has None for a closed one
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def leave_to_parent() -> None:
    """Ignore Ctrl-C and SIGHUP in a worker process. They reach all processes of a terminal; the first one acts."""
    for number in _NUMBERS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)

"""Parts and pieces of work that end within a number of minutes. Nothing that is finished is lost.

A part is a list of pieces, in the order of their worth, and a JSON file. The file is written whole after each piece, so
that a call that is killed loses only the piece at work. The next call with the same folder makes only the pieces that
have no figures yet. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["MARGIN", "Call", "Part", "Piece", "Place", "failure", "finished", "read", "run", "scale"]

Figures = dict[str, Any]
Records = Mapping[str, Mapping[str, Any]]
"""The records of the pieces of a part, by the name of the piece."""

MARGIN = 1.25  # a piece is started if this multiple of its expected time is left
_LEAST_SCALE = 0.5  # a few fast pieces say little about the others
_TEXT = 2000  # characters of an error message


class Call:
    """One call of the command: the time that it has, and whether it is to stop.

    Args:
        seconds: the time of the call.
        clock: the current time in seconds.
        stopped: whether the user wants the call to stop.
    """

    def __init__(
        self, seconds: float, clock: Callable[[], float] = time.monotonic, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        self.clock, self.stopped = clock, stopped
        self._end = clock() + seconds

    def left(self) -> float:
        """Return the seconds that are left."""
        return self._end - self.clock()


@dataclass(frozen=True)
class Piece:
    """One measurement.

    Attributes:
        name: a name, unique within the part.
        seconds: the time that it is expected to take on an H100.
        reason: why.
        make: returns the figures. It may put an ``error`` into them (see `failure`) if it measured only a part, and
            ``unfinished`` (a sentence) if it stopped: the next call makes it again.
        least: the time that a piece needs which stops itself before the time is over; None for others.
    """

    name: str
    seconds: float
    reason: str
    make: Callable[[Call], Figures]
    least: float | None = None


@dataclass(frozen=True)
class Part:
    """A list of pieces.

    Attributes:
        letter: its letter on the command line.
        title: its title in the page.
        file: the name of its JSON file.
        plan: returns the pieces from the records so far, and the expected seconds of work that still fit.
        prepare: called before the first piece.
        close: called at the end.
        most: the time that the part may take in a call, so that an unexpectedly slow part leaves time to the next.
    """

    letter: str
    title: str
    file: str
    plan: Callable[[Records, float], Sequence[Piece]]
    prepare: Callable[[], object] = lambda: None
    close: Callable[[], object] = lambda: None
    most: float = math.inf


@dataclass(frozen=True)
class Place:
    """Where results go, and what is called around the pieces.

    Attributes:
        folder: the folder of the JSON files.
        rehearsed: whether the pieces only rehearse.
        machine: returns the machine that makes the pieces.
        save: writes a text file whole.
        say: shows a line of progress.
        tidy: called after each piece.
    """

    folder: Path
    rehearsed: bool
    machine: Callable[[], dict[str, Any]]
    save: Callable[[Path, str], object]
    say: Callable[[str], object]
    tidy: Callable[[], object] = lambda: None


def failure(error: BaseException) -> dict[str, Any]:
    """Return the type, the message and the last lines of the traceback of an error."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return {"type": type(error).__name__, "message": str(error)[:_TEXT], "traceback": lines[-12:]}


def finished(record: Mapping[str, Any] | None) -> bool:
    """Return whether the record of a piece has all its figures."""
    return record is not None and "figures" in record and not record.keys() & {"error", "unfinished"}


def scale(records: Iterable[Mapping[str, Any]], gpu: str | None) -> float:
    """Return how long the finished pieces of a GPU took, over what was expected of them, but at least 1/2.

    Example:
        >>> record = {"figures": {}, "seconds": 30.0, "expected": 20.0, "machine": {"gpu": "NVIDIA H100"}}
        >>> scale([record], "NVIDIA H100"), scale([record], "NVIDIA H200")
        (1.5, 1.0)
    """
    own = [record for record in records if finished(record) and record["machine"]["gpu"] == gpu]
    expected = sum(record["expected"] for record in own)
    return max(_LEAST_SCALE, sum(record["seconds"] for record in own) / expected) if expected else 1.0


def read(path: Path) -> dict[str, Any]:
    """Return the content of the JSON file of a part; that of a new one if there is no file.

    Raises:
        ValueError: the file is damaged, or not that of a part.
    """
    if not path.is_file():
        return {"pieces": {}}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected the JSON of a part in {path}, got a damaged file: {error}; move it away") from error
    if not isinstance(content, dict) or not isinstance(content.get("pieces"), dict):
        raise ValueError(f"expected the JSON of a part in {path}, got another file; move it away")
    return content


def run(part: Part, place: Place, call: Call) -> bool:
    """Make the pieces of a part that have no figures yet and fit into the time.

    Returns:
        True if nothing raised.

    Raises:
        ValueError: the file of the part is damaged, or a rehearsal meets results or the reverse.
    """
    return _Work(part, place, call).run()


class _Work:
    """The pieces of a part in one call."""

    def __init__(self, part: Part, place: Place, call: Call) -> None:
        self.part, self.place, self.whole = part, place, call
        self.call = Call(min(call.left(), part.most), call.clock, call.stopped)  # the time of the part
        self.path = place.folder / part.file
        content = read(self.path)
        if content.get("rehearsed", place.rehearsed) != place.rehearsed:
            kinds = ("a rehearsal", "results") if place.rehearsed else ("results", "a rehearsal")
            raise ValueError(f"expected {kinds[0]} in {self.path}, got {kinds[1]}; give another folder")
        self.records: dict[str, dict[str, Any]] = {
            name: record for name, record in content["pieces"].items() if "left" not in record
        }
        self.error: dict[str, Any] | None = None
        self.machine: dict[str, Any] = {"gpu": None}
        self.tried: set[str] = set()  # in this call

    def scale(self) -> float:
        return MARGIN * scale(self.records.values(), self.machine["gpu"])

    def run(self) -> bool:
        pieces: Sequence[Piece] = ()
        self.save()
        try:
            self.machine = self.place.machine()
            self.part.prepare()
            while not self.call.stopped():
                pieces = self.part.plan(self.records, self.call.left() / self.scale())
                piece = next((piece for piece in pieces if self.ready(piece)), None)
                if piece is None:
                    break
                self.make(piece)
            self.part.close()
        except Exception as error:  # no fault of a part may keep the others from their time
            self.error = failure(error)
            self.place.say(f"{self.part.letter}  raised {type(error).__name__}: {str(error)[:200]}")
        self.note_not_started(pieces)
        self.save()
        return self.error is None and not any("error" in self.records[name] for name in self.tried)

    def ready(self, piece: Piece) -> bool:
        """Return whether a piece is to be made, and fits into the time."""
        if piece.name in self.tried or finished(self.records.get(piece.name)):
            return False
        return self.scale() * (piece.seconds if piece.least is None else piece.least) <= self.call.left()

    def make(self, piece: Piece) -> None:
        """Make a piece and write its record."""
        self.tried.add(piece.name)
        record: dict[str, Any] = {"expected": piece.seconds, "machine": self.machine}
        start = self.call.clock()
        try:
            figures = piece.make(self.call)
            record.update({key: figures.pop(key) for key in ("error", "unfinished") if key in figures})
            record["figures"] = figures
        except Exception as error:
            record["error"] = failure(error)
        record["seconds"] = round(self.call.clock() - start, 3)
        self.records[piece.name] = record
        self.save()
        self.place.tidy()
        outcome = record.get("unfinished", "raised " + record["error"]["type"] if "error" in record else "done")
        times = f"{record['seconds']:.1f} s, {self.whole.left():.0f} s left"
        self.place.say(f"{self.part.letter}  {piece.name}: {outcome}, {times}")

    def note_not_started(self, pieces: Iterable[Piece]) -> None:
        """Record the pieces that did not fit."""
        for piece in pieces:
            if piece.name not in self.records:
                self.records[piece.name] = {"expected": piece.seconds, "left": round(max(0.0, self.call.left()), 1)}

    def save(self) -> None:
        content: dict[str, Any] = {"part": self.part.letter, "title": self.part.title}
        content |= {"rehearsed": self.place.rehearsed, "error": self.error, "pieces": self.records}
        self.place.save(self.path, json.dumps(content, indent=1) + "\n")

"""Parts and pieces end in time, and lose nothing. A clock stands still except where a piece advances it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu.budget import MARGIN, Call, Part, Piece, Place, finished, run, scale


class Clock:
    """A clock that only pieces advance."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class World:
    """A folder, a clock, and the names of the pieces that were made."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock = folder, Clock()
        self.made: list[str] = []
        self.lines: list[str] = []
        self.gpu = "NVIDIA H100"

    def place(self, rehearsed: bool = False) -> Place:
        return Place(self.folder, rehearsed, lambda: {"gpu": self.gpu}, Path.write_text, self.lines.append)

    def piece(self, name: str, expected: float, takes: float, **changes: Any) -> Piece:
        def make(call: Call) -> dict[str, Any]:
            self.made.append(name)
            self.clock.now += takes
            return {"name": name}

        return Piece(name, expected, "made up", changes.pop("make", make), **changes)

    def run(self, pieces: Sequence[Piece], seconds: float, **changes: Any) -> bool:
        stopped = changes.pop("stopped", lambda: False)
        part = Part("x", "made up", "x.json", lambda records, room: pieces, **changes)
        return run(part, self.place(), Call(seconds, self.clock, stopped))

    def content(self) -> dict[str, Any]:
        return json.loads((self.folder / "x.json").read_text())

    def records(self) -> dict[str, Any]:
        return self.content()["pieces"]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def failing(message: str) -> Callable[[Call], dict[str, Any]]:
    def make(call: Call) -> dict[str, Any]:
        raise RuntimeError(message)

    return make


@settings(max_examples=100)
@given(
    lengths=st.lists(st.tuples(st.floats(0.1, 100.0), st.floats(0.0, 300.0)), max_size=8),
    seconds=st.floats(0.0, 300.0),
)
def test_nothing_is_started_once_the_time_is_over(lengths, seconds):
    """Whatever the pieces take, only the last one that is started may end too late."""
    with TemporaryDirectory() as folder:
        world = World(Path(folder))
        end = world.clock.now + seconds
        begun: list[float] = []

        def make(takes: float) -> Callable[[Call], dict[str, Any]]:
            def work(call: Call) -> dict[str, Any]:
                begun.append(world.clock.now)
                world.clock.now += takes
                return {}

            return work

        pieces = [world.piece(str(i), one, 0, make=make(takes)) for i, (one, takes) in enumerate(lengths)]
        assert world.run(pieces, seconds)
        assert all(moment < end for moment in begun)


@settings(max_examples=200)
@given(
    lengths=st.lists(st.floats(0.1, 100.0), max_size=8),
    overruns=st.lists(st.floats(0.0, MARGIN), min_size=8, max_size=8),
    seconds=st.floats(0.0, 300.0),
)
def test_a_call_ends_in_time_for_every_order_and_length_of_pieces(lengths, overruns, seconds):
    with TemporaryDirectory() as folder:
        world = World(Path(folder))
        start = world.clock.now

        def limited(expected: float, overrun: float, name: str) -> Piece:
            # A piece takes what it is expected to take at this moment, by the scale of those before, and up to the
            # margin more.
            def make(call: Call) -> dict[str, Any]:
                world.clock.now += expected * overrun * scale(world.records().values(), world.gpu)
                return {}

            return world.piece(name, expected, 0.0, make=make)

        pieces = [limited(one, over, str(i)) for i, (one, over) in enumerate(zip(lengths, overruns, strict=False))]
        assert world.run(pieces, seconds)
        assert world.clock.now - start <= seconds + 1e-6
        for piece in pieces:
            record = world.records()[piece.name]
            assert finished(record) != ("left" in record)


def test_a_piece_that_does_not_fit_is_passed_over_for_a_shorter_one(world):
    pieces = [world.piece("a", 10, 10), world.piece("long", 100, 100), world.piece("short", 10, 10)]
    assert world.run(pieces, 40)
    assert world.made == ["a", "short"]
    assert world.records()["long"] == {"expected": 100, "left": 20.0}


@pytest.mark.parametrize(("takes", "made"), [(20.0, ["a"]), (5.0, ["a", "b"]), (0.1, ["a", "b"])])
def test_slow_pieces_make_the_later_ones_longer(world, takes, made):
    world.run([world.piece("a", 10, takes), world.piece("b", 10, 0)], takes + 13)
    assert world.made == made


def test_fast_pieces_shorten_the_later_ones_to_a_half_at_most(world):
    world.run([world.piece("a", 10, 0.0), world.piece("b", 10, 0.0)], 13)
    assert scale(world.records().values(), world.gpu) == 0.5
    assert scale(world.records().values(), "another GPU") == 1.0


def test_the_next_call_makes_only_what_is_left(world):
    pieces = [world.piece(name, 10, 10) for name in "abc"]
    assert world.run(pieces, 15)
    assert world.run(pieces, 15)
    assert world.made == ["a", "b"]
    world.gpu = "NVIDIA H200"
    assert world.run(pieces, 100)
    assert world.made == ["a", "b", "c"]
    assert [world.records()[name]["machine"]["gpu"] for name in "abc"] == ["NVIDIA H100"] * 2 + ["NVIDIA H200"]


def test_a_piece_that_raises_stops_nothing_and_is_made_again(world):
    bad = world.piece("bad", 10, 10, make=failing("no memory " + "x" * 5000))
    assert not world.run([world.piece("a", 10, 10), bad, world.piece("b", 10, 10)], 100)
    error = world.records()["bad"]["error"]
    assert error["type"] == "RuntimeError"
    assert error["message"].startswith("no memory")
    assert len(error["message"]) == 2000
    assert any("raise RuntimeError" in line for line in error["traceback"])
    assert world.made == ["a", "b"]
    assert world.run([world.piece("bad", 10, 10)], 100)
    assert finished(world.records()["bad"])


def test_the_message_of_a_piece_stays_if_the_next_call_has_no_time_for_it(world):
    bad = world.piece("bad", 10, 10, make=failing("no memory"))
    assert not world.run([bad], 100)
    assert world.run([bad], 1)
    assert world.records()["bad"]["error"]["message"] == "no memory"


def test_figures_beside_an_error_or_of_an_unfinished_piece_stay_and_are_made_again(world):
    def make(call: Call) -> dict[str, Any]:
        return {"half": 1, "error": {"type": "RuntimeError", "message": "", "traceback": []}}

    def stop(call: Call) -> dict[str, Any]:
        return {"half": 2, "unfinished": "stopped"}

    assert not world.run([world.piece("a", 1, 1, make=make)], 100)
    assert world.records()["a"]["figures"] == {"half": 1}
    assert world.run([world.piece("a", 1, 1, make=stop)], 100)
    assert world.records()["a"]["unfinished"] == "stopped"
    assert world.lines[-1] == "x  a: stopped, 0.0 s, 100 s left"
    assert world.run([world.piece("a", 1, 1)], 100)
    assert world.records()["a"]["figures"] == {"name": "a"}


@pytest.mark.parametrize("where", ["prepare", "plan", "machine", "close"])
def test_a_part_that_raises_is_recorded(world, where):
    def bad(*arguments: Any) -> Any:
        raise OSError(f"no {where}")

    part = Part("x", "made up", "x.json", lambda records, room: [])
    place = replace(world.place(), machine=bad) if where == "machine" else world.place()
    assert not run(part if where == "machine" else replace(part, **{where: bad}), place, Call(100, world.clock))
    assert world.content()["error"]["message"] == f"no {where}"
    assert world.run([world.piece("a", 1, 1)], 100)
    assert world.content()["error"] is None


def test_a_kill_between_two_pieces_loses_nothing(world):
    def killed(call: Call) -> dict[str, Any]:
        assert finished(world.records()["a"])  # its file is written before the next piece starts
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.run([world.piece("a", 10, 10), world.piece("b", 10, 10, make=killed)], 100)
    assert world.run([world.piece(name, 10, 10) for name in "ab"], 100)
    assert world.made == ["a", "b"]


def test_a_stop_request_ends_the_call_after_the_piece_at_work(world):
    assert world.run([world.piece(name, 10, 10) for name in "abc"], 100, stopped=lambda: world.made == ["a", "b"])
    assert world.made == ["a", "b"]
    assert world.records()["c"] == {"expected": 10, "left": 80.0}


def test_a_piece_that_stops_itself_needs_only_its_least_time(world):
    assert world.run([world.piece("a", 1000, 10, least=10.0), world.piece("b", 1000, 10, least=30.0)], 20)
    assert world.made == ["a"]


def test_a_part_leaves_time_to_the_next(world):
    assert world.run([world.piece(name, 10, 10) for name in "abc"], 100, most=25.0)
    assert world.made == ["a", "b"]
    assert world.records()["c"] == {"expected": 10, "left": 5.0}
    assert world.run([world.piece(name, 10, 10) for name in "abc"], 100, most=25.0)
    assert world.made == ["a", "b", "c"]


def test_a_plan_hears_of_the_results_and_of_the_room(world):
    heard = []

    def plan(records: Any, room: float) -> list[Piece]:
        heard.append((len(records), room))
        return [world.piece(str(len(records)), 10, 20)] if len(records) < 2 else []

    assert run(Part("x", "made up", "x.json", plan), world.place(), Call(100, world.clock))
    assert heard == [(0, 100 / MARGIN), (1, 80 / MARGIN / 2), (2, 60 / MARGIN / 2)]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", r"expected the JSON of a part in .*x\.json, got a damaged file: .*; move it away"),
        ("[]", r"expected the JSON of a part in .*x\.json, got another file; move it away"),
        ('{"rehearsed": true, "pieces": {}}', r"expected results in .*x\.json, got a rehearsal; give another folder"),
    ],
)
def test_a_wrong_file_is_refused(world, content, sentence):
    (world.folder / "x.json").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        world.run([], 100)
    assert (world.folder / "x.json").read_text() == content


def test_a_rehearsal_does_not_write_among_results(world):
    world.run([], 100)
    with pytest.raises(ValueError, match=r"expected a rehearsal in .*, got results"):
        run(Part("x", "made up", "x.json", lambda records, room: []), world.place(True), Call(math.inf, world.clock))

"""Runs on a GPU stop at the end of an epoch, continue in the next call, and are published once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import timing, together
from benchmarks.cifar100_run import Run
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import page, tables
from benchmarks.gpu.budget import Call, Place, finished, run
from benchmarks.gpu.files import join, split
from examples.data import load_data
from tests.benchmarks.results import made_up

CPU = torch.device("cpu")
RUNS = [Run("resnet20", 2, method, 0.5, 0, 3, None) for method in ("feather", "soft")]


class Clock:
    """A clock that stands still until a test advances it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


# A step of one network or two takes a second, so an epoch takes 11 s, a run 43 s, and the shortest piece 26 s.
FIGURES = {"network": "resnet20", "count": 2, "compiled": False, "captured": True, "sparse": {"step": 0.5}}
SLOW = {"slow": {"figures": FIGURES, "machine": {"gpu": None}}, "alone": {"figures": {}, "machine": {"gpu": None}}}
SLOW["alone"]["figures"] = {**FIGURES, "count": 1, "sparse": {"step": 1.0}}


def call_d(folder: Path, seconds: float, clock: Clock | None = None) -> tuple[bool, dict[str, Any]]:
    """Make a call of part d, and return whether nothing raised, and the records."""

    folder.mkdir(exist_ok=True)

    def results() -> list[Any]:
        path = folder / "d.json"
        return tables.contents(json.loads(path.read_text())["pieces"]) if path.is_file() else []

    made = tables.Tables(
        folder=folder / "checkpoints",
        load=lambda: load_data("digits", folder),
        device=CPU,
        images=1437,
        measured=lambda: SLOW,
        results=results,
        backend="eager",
        most=2,
        gpu=None,
        pace=1.0,
        warm=set(),
    )
    part = made.part("d", "made up", "d.json", lambda results: RUNS)
    place = Place(folder, True, timing.machine, timing.write_whole, lambda line: None)
    good = run(part, place, Call(seconds, clock or Clock()))
    return good, json.loads((folder / "d.json").read_text())["pieces"]


def test_runs_that_fit_train_together(tmp_path):
    good, records = call_d(tmp_path, 1000.0)
    assert good
    assert records.keys() == {"resnet20_feather_0.5_seed0 and 1 more"}
    assert [result["run"] for result in tables.contents(records)] == [asdict(each) for each in RUNS]
    assert not (tmp_path / "checkpoints").exists()
    again = (tmp_path / "d.json").read_text()
    assert call_d(tmp_path, 1000.0)[0]
    assert (tmp_path / "d.json").read_text() == again


def test_a_run_that_does_not_fit_stops_at_an_epoch_and_continues(tmp_path, monkeypatch):
    whole = tables.contents(call_d(tmp_path / "whole", 1000.0)[1])
    folder = tmp_path / "parts"
    clock, execute = Clock(), together.execute

    def slow(*arguments: Any, stopped: Callable[[], bool], **options: Any) -> bool:
        def after_an_epoch() -> bool:
            clock.now += 11.0
            return stopped()

        return execute(*arguments, stopped=after_an_epoch, **options)

    monkeypatch.setattr(together, "execute", slow)
    name = "resnet20_feather_0.5_seed0 and 1 more"  # two take as long as one
    good, records = call_d(folder, 30.0, clock)
    assert good
    assert records[name] == {"expected": 43.0, "left": 30.0}
    good, records = call_d(folder, 40.0, clock)
    assert good
    # 18 s are left after two epochs. The third may take 14 s, by the margin, and 5 s are for the checkpoint.
    assert clock.now == 22.0
    assert records[name]["unfinished"] == "stopped 2 epochs later, to be continued"
    assert not finished(records[name])
    assert together.unfinished(folder / "checkpoints") == [RUNS]
    good, records = call_d(folder, 1000.0)
    assert good
    assert [*records] == [name]
    assert finished(records[name])
    assert not (folder / "checkpoints").exists()
    for ours, expected in zip(tables.contents(records), whole, strict=True):
        assert ours["layers"] == expected["layers"]
        assert ours["accuracy"] == expected["accuracy"]


def test_the_files_of_a_group_that_was_killed_before_its_record_are_used(tmp_path, monkeypatch):
    call_d(tmp_path, 1000.0)
    results = tables.contents(json.loads((tmp_path / "d.json").read_text())["pieces"])
    (tmp_path / "d.json").unlink()
    (tmp_path / "checkpoints").mkdir()
    for result in results:
        path = tmp_path / "checkpoints" / f"{Run(**result['run']).name}.json"
        path.write_text(json.dumps(result))
    monkeypatch.setattr(together, "execute", None)
    assert tables.contents(call_d(tmp_path, 1000.0)[1]) == results


def test_a_group_that_raises_is_made_in_smaller_groups(tmp_path, monkeypatch):
    execute = together.execute

    def limited(runs: Any, *arguments: Any, **options: Any) -> bool:
        if len(runs) > 1 or runs[0].method == "soft":
            raise torch.OutOfMemoryError(f"no memory for {len(runs)}")
        return execute(runs, *arguments, **options)

    monkeypatch.setattr(together, "execute", limited)
    good, records = call_d(tmp_path, 1000.0)
    assert not good
    one, two, three = records.values()
    assert one["error"]["message"] == "no memory for 2"
    assert [result["run"]["method"] for result in two["figures"]["runs"]] == ["feather"]
    assert three["error"]["message"] == "no memory for 1"


def test_a_large_checkpoint_is_split_and_joined(tmp_path):
    path = tmp_path / "together_1.checkpoint.pt"
    content = bytes(range(256)) * 10
    path.write_bytes(content)
    (tmp_path / "small.checkpoint.pt").write_bytes(b"small")
    split(tmp_path, 200)
    assert len([*tmp_path.glob("together_1.checkpoint.pt.part*")]) == 13
    assert not path.exists()
    assert (tmp_path / "small.checkpoint.pt").exists()
    join(tmp_path)
    assert path.read_bytes() == content
    assert {each.name for each in tmp_path.iterdir()} == {path.name, "small.checkpoint.pt"}


def part_of(folder: Path, letter: str, results: list[dict[str, Any]], rehearsed: bool = False) -> None:
    machine = {**results[0]["machine"], "gpu": "NVIDIA H100"}
    record = {"expected": 1.0, "seconds": 2.0, "machine": machine, "figures": {"runs": results}}
    waiting = {f"waiting {i}": {"expected": 759.0, "left": 12.3} for i in range(7)}
    content = {"title": "Runs", "rehearsed": rehearsed, "error": None, "pieces": {"a group": record, **waiting}}
    (folder / page.FILES[letter]).write_text(json.dumps(content))


def test_runs_are_published_as_single_files_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
    results = [made_up(method, 0.98, 0, 0.6, loss=1.0) for method in ("feather", "soft")]
    part_of(tmp_path, "d", results)
    part_of(tmp_path, "e", results[:1])
    target = tmp_path / "results" / "cifar100_paper"
    target.mkdir(parents=True)
    (target / "resnet20_soft_0.98_seed0.json").write_text("mine")
    assert command.main(["--publish", "--out", str(tmp_path)]) == 0
    assert "published 1 runs" in capsys.readouterr().out
    assert (target / "resnet20_soft_0.98_seed0.json").read_text() == "mine"
    assert json.loads((target / "resnet20_feather_0.98_seed0.json").read_text()) == results[0]


def test_a_rehearsal_is_not_published(tmp_path, capsys):
    part_of(tmp_path, "d", [made_up("feather", 0.98, 0, 0.6)], rehearsed=True)
    assert command.main(["--publish", "--out", str(tmp_path)]) == 2
    assert "got a rehearsal; its accuracies mean nothing" in capsys.readouterr().err


def test_the_page_shows_runs_machines_and_what_was_not_started(tmp_path):
    results = [made_up(method, 0.98, 0, accuracy) for method, accuracy in (("feather", 0.6), ("soft", 0.65))]
    part_of(tmp_path, "d", results)
    other = made_up("hard", 0.98, 0, 0.5)
    other["machine"]["commit"] = "other"
    part_of(tmp_path, "e", [other, results[0]])
    text = page.write(tmp_path)
    assert "The results come from several machines or commits." in text
    assert "* `waiting 0` was not started: expected 759 s, 12 s left." in text
    assert "* 2 others were not started." in text
    assert "| soft | 65.00 |" in text
    assert "in each of the 3 runs" in text  # the run that both parts have counts once
    assert "This is a rehearsal" not in text


@pytest.mark.parametrize("count", [1, 8])
def test_the_reason_of_a_group_says_how_it_trains(count, tmp_path):
    made = tables.Tables(
        tmp_path, lambda: load_data("digits", tmp_path), CPU, 50_000, dict, list, "x", 8, None, 1, set()
    )
    runs = [Run("resnet20", 0, "feather", 0.9, seed, 160, None) for seed in range(count)]
    (piece,) = made.part("d", "", "d.json", lambda results: runs).plan({}, 1e9)
    assert piece.reason.startswith(f"{count} at once, 62400 steps of {2.9 if count == 1 else 13.6} ms, captured")
    assert piece.seconds > 100
    (piece, *_) = made.part("d", "", "d.json", lambda results: runs).plan({}, 100.0)
    assert piece.name == "resnet20_feather_0.9_seed0"
    assert piece.least is not None
    assert piece.least < 20

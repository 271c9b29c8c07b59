"""The CIFAR-100 table: interruptions do not change a run, and only missing runs are made."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks import cifar100_results, cifar100_table, timing
from benchmarks.cifar100_run import Run, execute
from benchmarks.cifar100_table import PROTOCOLS, Protocol
from benchmarks.methods import DENSE, METHODS
from examples.data import ImageData, Split

CPU = torch.device("cpu")
TINY = Protocol({"resnet20": 2}, (0.5, 0.9), ("feather", "hard"), seeds=2, epochs=1, train_size=100, dataset="ten")


@pytest.fixture(scope="module")
def data() -> ImageData:
    generator = np.random.default_rng(0)

    def split(count: int) -> Split:
        images = torch.from_numpy(generator.integers(0, 256, (count, 3, 8, 8), dtype=np.uint8))
        return Split(images, torch.arange(count) % 4)

    return ImageData(split(300), split(50), 4, padding=1, flip=True, mean=(0.5,) * 3, std=(0.25,) * 3)


def runnable(name: str) -> bool:
    """Return whether this version of the library takes the settings of a method."""
    try:
        METHODS[name].apply(nn.Linear(4, 4), 0.5, 10)
    except ValueError:
        return False
    return True


RUNNABLE = [name for name in METHODS if runnable(name)]


def a_run(method: str, rate: float = 0.8, seed: int = 0) -> Run:
    return Run("resnet20", 2, method, 0.0 if method == DENSE else rate, seed, epochs=2, train_size=None)


def result(run: Run, folder: Path) -> dict[str, Any]:
    content = run.done(folder)
    assert content is not None
    return {key: value for key, value in content.items() if key not in ("seconds", "machine")}


def uninterrupted(run: Run, data: ImageData, folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    steps: list[int] = []
    assert execute(run, data, CPU, folder, steps.append, lambda: False)
    assert sum(steps) == 2 * 3
    return result(run, folder)


@pytest.mark.parametrize("method", [DENSE, *RUNNABLE])
def test_an_interrupted_run_continues_to_the_same_result(method, data, tmp_path):
    run = a_run(method)
    whole = uninterrupted(run, data, tmp_path / "whole")
    assert whole["zeros"] == whole["promised"] == round(run.rate * whole["total"])
    again = tmp_path / "again"
    again.mkdir()
    steps: list[int] = []
    for stop in (2, 4):  # before and after one_shot freezes its mask
        assert not execute(run, data, CPU, again, steps.append, lambda stop=stop: sum(steps) == stop)
        assert run.done(again) is None
        steps[:] = []
    assert execute(run, data, CPU, again, steps.append, lambda: False)
    assert steps == [4, 1, 1]
    assert result(run, again) == whole
    assert [path.suffix for path in again.iterdir()] == [".json"]


def test_methods_differ_where_they_should(data, tmp_path):
    losses = {method: uninterrupted(a_run(method), data, tmp_path / method)["loss"] for method in RUNNABLE}
    same = {frozenset({"feather", "theta_1"})}  # theta is 1 up to a rate of 0.95
    for one in losses:
        for other in losses:
            if one < other and losses[one] == losses[other]:
                assert frozenset({one, other}) in same | {frozenset({name, "theta_late"}) for name in losses}


def test_a_result_of_other_settings_is_refused(data, tmp_path):
    run = a_run("feather")
    uninterrupted(run, data, tmp_path)
    with pytest.raises(ValueError, match=r"expected the settings .*'epochs': 3.* in .*; move it away"):
        replace(run, epochs=3).done(tmp_path)


def test_the_papers_protocol():
    runs = PROTOCOLS["paper"].runs()
    assert len(runs) == len(set(runs)) == 3 * 3 * (1 + 5 * 7)
    assert len({run.name for run in runs}) == len(runs)
    assert [run.method for run in runs[:18]] == [DENSE] * 3 + ["feather"] * 15
    assert {run.epochs for run in runs} == {160}


def write_cifar(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for name, count in (("train", 400), ("test", 40)):
        records = generator.integers(0, 256, (count, 2 + 3072), dtype=np.uint8)
        records[:, 1] = np.arange(count) % 20
        path = folder / "cifar-100-binary" / f"{name}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(records.tobytes())


def test_only_missing_runs_are_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PROTOCOLS, "ten", TINY)
    write_cifar(tmp_path / "data")
    command = ["--protocol", "ten", "--data-dir", str(tmp_path / "data"), "--results", str(tmp_path), "--jobs", "2"]
    assert cifar100_table.main(command) == 0
    first = capsys.readouterr().out
    folder = tmp_path / "ten"
    files = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(files) == 2 + 2 * 2 * 2
    gone = folder / "resnet20_hard_0.9_seed1.json"
    before = json.loads(gone.read_text())
    gone.unlink()
    assert cifar100_table.main(command) == 0
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name for name in after if after[name] != files[name]} == {gone.name}
    assert json.loads(gone.read_text())["accuracy"] == before["accuracy"]
    assert "exactly the promised one in each of the 10 runs" in first
    assert (tmp_path / "ten.md").read_text() + "\n" == capsys.readouterr().out
    assert (tmp_path / "ten.png").stat().st_size > 10_000
    monkeypatch.setitem(PROTOCOLS, "ten", replace(TINY, epochs=3))
    assert cifar100_table.main(command) == 2
    assert "expected the settings" in capsys.readouterr().err
    assert cifar100_table.main([*command, "--only-table"]) == 0


def test_another_number_of_epochs_has_another_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PROTOCOLS, "ten", replace(TINY, seeds=1, rates=(0.5,), methods=("feather",)))
    write_cifar(tmp_path / "data")
    command = ["--protocol", "ten", "--data-dir", str(tmp_path / "data"), "--results", str(tmp_path), "--jobs", "1"]
    assert cifar100_table.main([*command, "--epochs", "2"]) == 0
    assert "# CIFAR-100, 2 epochs" in capsys.readouterr().out
    assert len(list((tmp_path / "ten_2_epochs").iterdir())) == 2
    assert not (tmp_path / "ten").exists()
    assert cifar100_table.main([*command, "--epochs", "1", "--only-table"]) == 1


def test_ctrl_c_saves_and_says_how_to_continue(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PROTOCOLS, "ten", replace(TINY, epochs=200))
    write_cifar(tmp_path / "data")
    command = ["--protocol", "ten", "--data-dir", str(tmp_path / "data"), "--results", str(tmp_path), "--jobs", "1"]
    update = cifar100_table.tqdm.update

    def interrupt(bar, n=1):
        if n and not bar.n:  # once, because a second Ctrl-C ends the program
            os.kill(os.getpid(), signal.SIGINT)
        return update(bar, n)

    monkeypatch.setattr(cifar100_table.tqdm, "update", interrupt)
    assert cifar100_table.main(command) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "ten").iterdir()] == ["resnet20_dense_0.0_seed0.checkpoint.pt"]


def test_missing_data_are_reported_in_one_sentence(tmp_path, monkeypatch, capsys):
    import torchvision

    def no_network(*args: object, **keywords: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", no_network)
    command = ["--protocol", "ten", "--data-dir", str(tmp_path), "--results", str(tmp_path)]
    assert cifar100_table.main(command) == 2
    assert "cifar100_table: error: expected CIFAR100 in" in capsys.readouterr().err


def test_without_results_there_is_no_table(tmp_path, capsys):
    assert cifar100_table.main(["--protocol", "ten", "--results", str(tmp_path), "--only-table"]) == 1
    assert capsys.readouterr().err == f"cifar100_table: no results in {tmp_path / 'ten'}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("only_table", [[], ["--only-table"]])
@pytest.mark.parametrize(
    ("content", "got"), [(b'{"run": ', "a damaged file"), (b"\xff", "a damaged file"), (b"[]", "another")]
)
def test_the_error_names_a_damaged_result(content, got, only_table, tmp_path, capsys):
    path = tmp_path / "ten" / f"{PROTOCOLS['ten'].runs()[0].name}.json"
    path.parent.mkdir()
    path.write_bytes(content)
    assert cifar100_table.main(["--protocol", "ten", "--results", str(tmp_path), *only_table]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"cifar100_table: error: expected the JSON of a run in {path}, got {got}")
    assert said.endswith("; move it away\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "argument --jobs: expected a number of 1 or more, got 0"),
        (["--seeds", "-1"], "argument --seeds: expected a number of 1 or more, got -1"),
        (["--rates", "0.9", "95"], r"argument --rates: expected a fraction of zeros in (0, 1), got 95"),
        (["--rates", "nan"], r"argument --rates: expected a fraction of zeros in (0, 1), got nan"),
        (["--rates", "most"], r"argument --rates: expected a fraction of zeros in (0, 1), got most"),
        (["--results", __file__], f"argument --results: expected a folder, got the file {__file__}"),
    ],
)
def test_wrong_arguments_are_reported(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cifar100_table.main(arguments)
    assert message in capsys.readouterr().err


def made_up(method: str, rate: float, seed: int, accuracy: float, **changes: Any) -> dict[str, Any]:
    run = {"network": "resnet20", "width": 0, "method": method, "rate": rate, "seed": seed, "epochs": 160}
    return {
        "run": {**run, "train_size": None},
        "accuracy": accuracy,
        "zeros": round(1000 * rate),
        "promised": round(1000 * rate),
        "total": 1000,
        "dead": [],
        "seconds": 100.0,
        "machine": timing.machine(),
        **changes,
    }


def test_the_table_shows_means_deviations_and_differences(tmp_path):
    results = [made_up(DENSE, 0.0, seed, 0.70 + 0.02 * seed) for seed in range(2)]
    results += [made_up("feather", 0.9, seed, 0.68 + 0.02 * seed) for seed in range(2)]
    results += [made_up("hard", 0.99, 0, 0.5, dead=["conv.weight"])]
    about = {DENSE: "no zeros", "feather": "ours", "hard": "another"}
    text = cifar100_results.write(results, about, tmp_path / "table")
    assert "| dense | 71.00 ± 1.41 |  |" in text
    assert "| feather | 69.00 ± 1.41 [-2.00] | not run |" in text
    assert "| hard | not run | 50.00 (n = 1) [-21.00] |" in text
    assert "exactly the promised one in each of the 5 runs; layers without survivors in some run: conv" in text
    results[-1]["zeros"] += 1
    assert "NOT the promised one" in cifar100_results.write(results, about, tmp_path / "table")


@pytest.mark.parametrize("rates", [[], [0.9], [0.9, 0.98, 0.99]])
def test_every_rate_is_well_inside_the_picture(rates):
    axes = Figure().subplots()
    cifar100_results._accuracy(
        axes, {(DENSE, 0.0): [70.0], **{("feather", rate): [60.0] for rate in rates}}, ["feather"]
    )
    assert axes.get_xlim() == (-0.5, max(1, len(rates)) - 0.5)

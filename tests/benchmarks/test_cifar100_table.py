"""The CIFAR-100 table: interruptions do not change a run, and only missing runs are made."""

from __future__ import annotations

import errno
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import cifar100_table
from benchmarks.cifar100_table import PROTOCOLS, Protocol
from benchmarks.methods import DENSE, METHODS

CPU = torch.device("cpu")
TINY = Protocol({"resnet20": 2}, (0.5, 0.9), ("feather", "hard"), seeds=2, epochs=1, train_size=100, dataset="ten")


def test_the_papers_protocol():
    runs = PROTOCOLS["paper"].runs()
    assert len(runs) == len(set(runs)) == 3 * 3 * (1 + 5 * 7)
    assert len({run.name for run in runs}) == len(runs)
    assert [run.method for run in runs[:18]] == [DENSE] * 3 + ["feather"] * 15
    assert {run.epochs for run in runs} == {160}


def test_protocol_ten_makes_its_most_telling_runs_first():
    protocol = PROTOCOLS["ten"]
    runs = protocol.runs()
    assert len(runs) == len(set(runs)) == 2 * 3 * (1 + 5 * len(protocol.methods))
    assert len({run.name for run in runs}) == len(runs)
    assert {run.network: run.width for run in runs} == {"mobilenet_v1": 0.5, "resnet20": 16}
    early = 2 * (1 + 3 * 4)  # two networks: dense, and four methods at three rates
    for seed in range(3):
        turn = runs[seed * early : (seed + 1) * early]
        assert {run.seed for run in turn} == {seed}
        assert {run.method for run in turn} == {DENSE, "feather", "soft", "p_0.5", "gradual"}
        assert {run.rate for run in turn} == {0.0, 0.9, 0.98, 0.995}
    assert [run.seed for run in runs[3 * early :]] == sorted(run.seed for run in runs[3 * early :])
    assert (runs[0].method, runs[1].rate) == (DENSE, 0.995)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_the_methods_of_a_protocol_exist(protocol):
    assert {*protocol.methods, *protocol.first, *protocol.drawn} <= METHODS.keys()
    assert {*protocol.first, *protocol.drawn} <= {*protocol.methods}
    assert set(protocol.first_rates) <= set(protocol.rates)


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
    assert "![accuracy against rate](ten.png)" in first
    monkeypatch.setitem(PROTOCOLS, "ten", replace(TINY, epochs=3))
    assert cifar100_table.main(command) == 2
    assert "expected the settings" in capsys.readouterr().err
    assert cifar100_table.main([*command, "--only-table"]) == 0
    written = {path: path.read_bytes() for path in tmp_path.glob("ten.*")}

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    capsys.readouterr()
    assert cifar100_table.main([*command, "--only-table"]) == 1
    full_disk = f"{tmp_path / 'ten.png'}: {os.strerror(errno.ENOSPC)}; free some space"
    assert capsys.readouterr().err == f"cifar100_table: failed: {full_disk}\n"
    assert {path: path.read_bytes() for path in tmp_path.glob("ten.*")} == written


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
        (
            ["--protocol", "digits", "--networks", "densenet"],
            "argument --networks: expected resnet20 in protocol digits",
        ),
        (["--results", __file__], f"argument --results: expected a folder, got the file {__file__}"),
    ],
)
def test_wrong_arguments_are_reported(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cifar100_table.main(arguments)
    assert message in capsys.readouterr().err

"""The options of the training script: their ranges, their errors, and those of a run to resume."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from examples import cifar100
from examples.cifar100 import parse
from examples.resumable import UserError, save_checkpoint, settings
from tests.examples.runs import only


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the script, expect it to fail with one sentence, and return the sentence."""
    assert cifar100.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--ptarget", "1"], "expected --ptarget to be"),
        (["--ptarget", "-0.1"], "expected --ptarget to be"),
        (["--ptarget", "nan"], "expected --ptarget to be"),
        (["--ptarget", "0.9999999999"], "--ptarget 0.9999999999 cannot be reached"),
        (["--ptarget", "a lot"], "argument --ptarget: invalid float value"),
        (["--pthres", "0.1"], "expected --pthres to be 0, got 0.1"),
        (["--t1", "3", "--epochs", "4"], "got --t1 3 and --epochs 4: .* make it --epochs 6 or more, or --t1 2 or less"),
        (["--t1", "-1"], "expected --t1 to be at least 0"),
        (["--epochs", "0"], "expected --epochs to be at least 1"),
        (["--batch-size", "1"], "expected --batch-size to be at least 2"),
        (["--lr", "0"], "expected --lr to be above 0"),
        (["--wd", "-1"], "expected --wd to be at least 0"),
        (["--workers", "-1"], "expected --workers to be at least 0"),
        (["--gpu", "-1"], "expected --gpu to be"),
        (["--seed", "-1"], "expected --seed to be"),
        (["--sname", "../up"], "expected --sname to be a file name"),
        (["--train-size", "1"], "expected --train-size to be at least 2"),
        (["--train-size", "5000"], "expected --train-size to be at most the 1437 images"),
        (["--p", "0"], "expected --p to be above 0"),
        (["--model", "vgg"], "argument --model: invalid choice"),
        (["--allocation", "per_layer"], "argument --allocation: invalid choice"),
        (["--dataset", "mnist"], "argument --dataset: invalid choice"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (
            ["--resume", "missing.pt"],
            "expected --resume to name a checkpoint file or the folder of a run, got missing.pt",
        ),
        (
            ["--resume", "."],
            "does not exist; a run that was killed before its first epoch ended has no checkpoint: start a new one",
        ),
    ],
)
def test_wrong_options_get_one_sentence(
    argv: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(sentence, fails(["--no-cuda", "--dataset=digits", *argv], capsys))
    assert not list(tmp_path.glob("models/*"))


def test_a_corrupt_or_foreign_checkpoint_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content = only(finished, "runs/*_whole/checkpoint.pt").read_bytes()
    path = Path("checkpoint.pt")
    for corrupt in (b"", b"hello", content[: len(content) // 2], content[100:]):
        path.write_bytes(corrupt)
        assert "damaged or something else" in fails(["--resume", "checkpoint.pt"], capsys)
    for foreign in ({"model": torch.ones(1)}, [1, 2], torch.ones(3)):
        torch.save(foreign, path)
        assert "a file of another program" in fails(["--resume", "checkpoint.pt"], capsys)
    checkpoint = torch.load(only(finished, "runs/*_whole/checkpoint.pt"), weights_only=True)
    torch.save({**checkpoint, "version": 99}, path)
    assert "version 99" in fails(["--resume", "checkpoint.pt"], capsys)
    torch.save({**checkpoint, "settings": {"lr": 1.0}}, path)
    assert "another version" in fails(["--resume", "checkpoint.pt"], capsys)
    torch.save({**checkpoint, "settings": {**checkpoint["settings"], "model": "densenet"}}, path)
    assert "expected a checkpoint of this network" in fails(["--resume", "checkpoint.pt"], capsys)


def test_resume_refuses_other_settings(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(only(finished, "runs/*_whole/checkpoint.pt"))
    assert "expected --lr to be 0.1 as in the run to resume, got 0.2" in fails(
        ["--resume", path, "--lr", "0.2"], capsys
    )
    assert "expected --epochs to be 4" in fails(["--resume", path, "--epochs", "8"], capsys)


def test_options_of_a_resumed_run_come_from_the_checkpoint(tmp_path: Path) -> None:
    saved = parse(["--lr=0.3", "--epochs=7", "--workers=2", "--data-dir=there", "--no-amp", "--compile"])
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, cifar100.PROGRAM, {"settings": settings(saved), "training": {}, "log": {}})

    def resumed(options: str = "") -> dict[str, object]:
        return settings(parse([f"--resume={path}", *options.split()]))

    assert resumed() == settings(saved)
    assert resumed("--lr=0.3 --workers=0 --gpu=1") == {**settings(saved), "workers": 0, "gpu": 1}
    for changed in ("--epochs=160", "--lr=0.1", "--amp"):  # the first two are the defaults
        with pytest.raises(UserError, match=changed.partition("=")[0]):
            resumed(changed)
    assert parse([f"--resume={tmp_path}"]).resume == path


@pytest.mark.parametrize(("argv", "workers"), [([], 0), (["--workers"], 8), (["--workers", "3"], 3)])
def test_workers_option(argv: list[str], workers: int) -> None:
    assert parse(argv).workers == workers


def test_the_original_command_line_is_understood() -> None:
    argv = "--gpu=0 --wd=5e-4 --epochs=160 --model=resnet20 --ptarget=0.90 --sname=resnet20_ep=160_wd=5e-4_pt=0.90"
    defaults = settings(parse([]))
    assert settings(parse(argv.split())) == {**defaults, "ptarget": 0.9, "sname": "resnet20_ep=160_wd=5e-4_pt=0.90"}
    expected = {"batch_size": 128, "lr": 0.1, "wd": 5e-4, "epochs": 160, "ptarget": 0.95, "pthres": 0.0, "t1": 0}
    assert expected.items() <= defaults.items()

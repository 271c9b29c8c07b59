"""The training script: what a run leaves, how it is interrupted and resumed, and what it says of wrong options."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from torch import Tensor

import archs
from examples import cifar100, demo
from examples.checkpoints import StopRequest
from examples.datasets import Split
from examples.processes import Processes
from examples.settings import Settings, UserError, given_options, options, settle
from examples.training import Score, Training, prunable, save

ROOT = Path(__file__).resolve().parents[2]
RATE = 0.8
TINY = f"--dataset digits --train-size 100 --batch-size 32 --epochs 4 --ptarget {RATE} --no-cuda".split()
STEPS = 16


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def baked(folder: Path) -> dict[str, Tensor]:
    return torch.load(only(folder, "models/*.pt"), weights_only=True)


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(a[key].equal(b[key]) for key in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the working folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cifar100.main([*TINY, "--sname", "whole"]) == 0
    return folder


def test_a_run_leaves_its_files(finished: Path) -> None:
    run = only(finished, "runs/*_whole")
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "results.json", "summary.png", "checkpoint.pt"} <= names
    assert (run / "summary.png").read_bytes().startswith(b"\x89PNG")
    assert only(finished, "models/*.pt").stem == run.name
    config = json.loads((run / "config.json").read_text())
    assert (config["settings"]["ptarget"], config["settings"]["epochs"]) == (RATE, 4)
    results = json.loads((run / "results.json").read_text())
    assert results["zeros"] == round(RATE * results["total"]) == sum(row["zeros"] for row in results["layers"])
    assert results["bytes_compressed"] < results["bytes"]
    assert [row["step"] for row in results["epochs"]] == [4, 8, 12, 16]
    assert results["accuracy"] == results["epochs"][-1]["accuracy"]
    assert config["processes"] == 1
    assert results["device"].startswith("cpu")
    assert "cpu (cpu)" not in results["device"]


def test_the_saved_model_is_plain_and_exactly_sparse(finished: Path) -> None:
    model = archs.resnet20(num_classes=10, in_channels=1)
    model.load_state_dict(baked(finished))
    weights = prunable(model).values()
    assert sum(int((weight == 0).sum()) for weight in weights) == round(RATE * sum(w.numel() for w in weights))


def events(folder: Path) -> dict[str, list[int]]:
    """Return the steps of each scalar as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [event.step for event in accumulator.Scalars(tag)] for tag in tags}


def test_tensorboard_shows_the_run(finished: Path) -> None:
    seen = events(only(finished, "runs/*_whole"))
    for tag in ("Loss/train", "Loss/test", "acc/test", "survivors/conv.weight", "survivors/fc.weight"):
        assert seen[tag] == [4, 8, 12, 16], tag
    for tag in ("prune_rate", "threshold", "lr"):
        assert seen[tag] == list(range(1, STEPS + 1)), tag


@pytest.mark.parametrize("at", [6, 8, STEPS])
def test_interrupted_and_resumed_is_uninterrupted(
    at: int,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = Training.step

    def interrupted(self: Training, images: Tensor, labels: Tensor) -> Tensor:
        if self.step_count == at - 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, images, labels)

    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", interrupted)
        assert cifar100.main(TINY) == 130
    checkpoint = only(Path(), "runs/*/checkpoint.pt")
    assert f"to go on: python {sys.argv[0]} --resume '{checkpoint}'" in capsys.readouterr().out
    assert torch.load(checkpoint, weights_only=True)["training"]["step"] == at
    assert not list(Path().glob("models/*"))
    assert cifar100.main(["--resume", str(checkpoint.parent), "--workers", "0", "--data-dir", "elsewhere"]) == 0
    assert identical(baked(Path()), baked(finished))
    ours, theirs = (
        json.loads(only(folder, "runs/*/results.json").read_text())["epochs"] for folder in (tmp_path, finished)
    )
    assert ours == theirs
    assert events(checkpoint.parent) == events(only(finished, "runs/*_whole"))
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_killed_process_loses_only_the_running_epoch(finished: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "examples" / "cifar100.py")]
    # Sums depend on the number of threads, and this process may have been given another one than is usual.
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [*script, *TINY, "--workers", "1"], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/checkpoint.pt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGKILL
    checkpoint = only(tmp_path, "runs/*/checkpoint.pt")
    assert torch.load(checkpoint, weights_only=True)["training"]["step"] % 4 == 0
    resumed = subprocess.run(
        [*script, "--resume", str(checkpoint), "--workers=0"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "test accuracy" in resumed.stdout
    assert identical(baked(tmp_path), baked(finished))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_end_with_the_same_zeros(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "examples" / "cifar100.py"), *TINY, "--sname", "both"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1  # one process speaks; it has checked that the others agree
    weights = [value for name, value in baked(tmp_path).items() if value.dim() > 1]
    zeros, total = sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)
    assert zeros == round(RATE * total)
    run = only(tmp_path, "runs/*_both")
    assert json.loads((run / "results.json").read_text())["epochs"][-1]["step"] == STEPS
    assert json.loads((run / "config.json").read_text())["processes"] == 2
    assert f"{json.loads((run / 'results.json').read_text())['seconds']:,.1f} s" in done.stdout


def test_a_stopped_run_of_several_processes_is_resumed_as_such(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        return None

    @contextmanager
    def two(cuda: bool) -> Iterator[Processes]:
        yield Processes(rank=0, count=2)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cifar100, "train", stopped)
    monkeypatch.setattr(cifar100, "joined", two)
    assert cifar100.main(TINY) == 130
    assert "to go on: torchrun --nproc-per-node=2 " in capsys.readouterr().out


def test_the_progress_bar_tells_of_an_evaluation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate, seen = Training.evaluate, []

    def noted(self: Training, split: Split) -> Score:
        seen.append(bars[0].desc)
        return evaluate(self, split)

    bars = []
    make = cifar100._progress_bar
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Training, "evaluate", noted)
    monkeypatch.setattr(cifar100, "_progress_bar", lambda *args: bars.append(make(*args)) or bars[0])
    assert cifar100.main([*TINY, "--epochs", "1", "--ptarget", "0"]) == 0
    assert seen[0] == "run, evaluating: "
    assert bars[0].desc == "run: "


def test_dense_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert cifar100.main([*TINY, "--ptarget", "0", "--epochs", "1", "--amp"]) == 0
    assert only(Path(), "runs/*/summary.png").stat().st_size > 0
    assert json.loads(only(Path(), "runs/*/results.json").read_text())["layers"] == []
    assert "(0.000%)" in capsys.readouterr().out


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_RATE", RATE)  # in so few steps, 95 % leaves dead layers, and a warning
    assert demo.main(epochs=1) == 0
    assert Path("runs/demo/demo.png").stat().st_size > 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["test", "dense", "sparse", "picture:"]


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the script, which is to fail with one sentence, and return the sentence."""
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
        (["--model", "vgg"], "argument --model: invalid choice"),
        (["--dataset", "mnist"], "argument --dataset: invalid choice"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (
            ["--resume", "missing.pt"],
            "expected --resume to name a checkpoint file or the folder of a run, got missing.pt",
        ),
        (
            ["--resume", "."],
            "got checkpoint.pt, which is none; a run that was killed before its first epoch ended has none",
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


def test_settings_of_a_resume_come_from_the_checkpoint() -> None:
    saved = vars(Settings(lr=0.3, epochs=7, workers=2, data_dir="there"))
    assert settle({}, saved) == Settings(**saved)
    assert settle({"lr": 0.3, "workers": 0, "gpu": 1}, saved) == Settings(**{**saved, "workers": 0, "gpu": 1})
    with pytest.raises(UserError, match="--epochs"):
        settle({"epochs": 160}, saved)  # given, though it is the default


@pytest.mark.parametrize(("argv", "workers"), [([], 0), (["--workers"], 8), (["--workers", "3"], 3)])
def test_workers_option(argv: list[str], workers: int) -> None:
    assert settle(given_options(options(), argv)).workers == workers


def test_the_original_command_line_is_understood() -> None:
    argv = "--gpu=0 --wd=5e-4 --epochs=160 --model=resnet20 --ptarget=0.90 --sname=resnet20_ep=160_wd=5e-4_pt=0.90"
    assert settle(given_options(options(), argv.split())) == Settings(
        ptarget=0.9, sname="resnet20_ep=160_wd=5e-4_pt=0.90"
    )
    assert settle({}) == Settings(batch_size=128, lr=0.1, wd=5e-4, epochs=160, ptarget=0.95, pthres=0, t1=0)


def test_saving_never_leaves_a_half_written_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.pt"
    save({"a": 1}, path)

    def torn(content: object, target: BinaryIO) -> None:
        target.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        save({"a": 2}, path)
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_stop_request_gives_the_handlers_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        # The next one is not held back any more.
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

"""The training script: the files of a run, interruption and resumption, several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import archs
import feather_param
from examples import cifar100, script
from examples.cifar100 import Training
from examples.processes import Processes
from examples.stop import Stopped, StopRequest
from tests.examples.runs import RATE, STEPS, TINY, baked, only, scalars
from tests.training import same_state

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_writes_its_files(finished: Path) -> None:
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


def test_the_saved_model_is_plain_and_exactly_sparse(finished: Path) -> None:
    model = archs.resnet20(num_classes=10, in_channels=1)
    model.load_state_dict(baked(finished))
    weights = [model.get_parameter(row.name) for row in feather_param.plan(model, final_rate=RATE).rows]
    assert sum(int((weight == 0).sum()) for weight in weights) == round(RATE * sum(w.numel() for w in weights))


def test_tensorboard_shows_the_run(finished: Path) -> None:
    seen = {tag: [step for step, _ in values] for tag, values in scalars(only(finished, "runs/*_whole")).items()}
    for tag in ("Loss/train", "Loss/test", "acc/test", "survivors/conv.weight", "survivors/fc.weight"):
        assert seen[tag] == [4, 8, 12, 16], tag
    for tag in ("prune_rate", "threshold", "lr"):
        assert seen[tag] == list(range(1, STEPS + 1)), tag


@pytest.mark.parametrize("at", [6, 8, STEPS])
def test_an_interrupted_and_resumed_run_ends_like_an_uninterrupted_one(
    at: int,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = Training.step

    def interrupted(self: Training, images: Tensor, labels: Tensor) -> None:
        if self.step_count == at - 1:
            signal.raise_signal(signal.SIGINT)
        step(self, images, labels)

    before = signal.getsignal(signal.SIGINT)  # ignored if the tests run in the background
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", interrupted)
        assert cifar100.main(TINY) == 130
    checkpoint = only(Path(), "runs/*/checkpoint.pt")
    assert f"to go on: python {sys.argv[0]} --resume '{checkpoint}'" in capsys.readouterr().out
    assert torch.load(checkpoint, weights_only=True)["training"]["step"] == at
    assert not list(Path().glob("models/*"))
    assert cifar100.main(["--resume", str(checkpoint.parent), "--workers", "0", "--data-dir", "elsewhere"]) == 0
    assert same_state(baked(Path()), baked(finished))
    ours, theirs = (
        json.loads(only(folder, "runs/*/results.json").read_text())["epochs"] for folder in (tmp_path, finished)
    )
    assert ours == theirs
    assert scalars(checkpoint.parent) == scalars(only(finished, "runs/*_whole"))
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_killed_process_loses_only_the_running_epoch(finished: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "examples" / "cifar100.py")]
    # Sums depend on the number of threads, which may not be the default in this process.
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
    assert same_state(baked(tmp_path), baked(finished))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_end_with_the_same_zeros(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "examples" / "cifar100.py"), *TINY, "--sname", "both"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1  # one process prints; it has checked that the others agree
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
    def stopped(options: object, parent: Path, stop: StopRequest, processes: Processes) -> None:
        stop.checkpoint = tmp_path / "checkpoint.pt"
        stop.checkpoint.touch()
        raise Stopped

    @contextmanager
    def two(cuda: bool) -> Iterator[Processes]:
        yield Processes(rank=0, count=2)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cifar100, "train", stopped)
    monkeypatch.setattr(script, "joined", two)
    assert cifar100.main(TINY) == 130
    assert "to go on: torchrun --nproc-per-node=2 " in capsys.readouterr().out


def test_the_progress_bar_shows_an_evaluation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate, seen = Training.evaluate, []

    def recorded(self: Training, model: nn.Module) -> tuple[float, float]:
        seen.append(bars[0].desc)
        return evaluate(self, model)

    bars = []
    make = cifar100.tqdm
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Training, "evaluate", recorded)
    monkeypatch.setattr(cifar100, "tqdm", lambda **options: bars.append(make(**options)) or bars[0])
    assert cifar100.main([*TINY, "--epochs", "1", "--ptarget", "0"]) == 0
    assert seen[0] == "run, evaluating: "
    assert bars[0].desc == "run: "


def test_dense_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert cifar100.main([*TINY, "--ptarget", "0", "--epochs", "1", "--amp"]) == 0
    assert only(Path(), "runs/*/summary.png").stat().st_size > 0
    assert json.loads(only(Path(), "runs/*/results.json").read_text())["layers"] == []
    assert "(0.000%)" in capsys.readouterr().out

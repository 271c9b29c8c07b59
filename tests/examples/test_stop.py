"""The first signal asks a training to stop after a checkpoint, and the second one ends it at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples import cifar100
from examples.cifar100 import Training
from examples.stop import StopRequest
from feather_param.utils.signals import Signalled
from tests.examples.runs import TINY, only

NAMES = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def send(name: str) -> None:
    signal.raise_signal(signal.Signals[name])


def handlers() -> list[object]:
    return [signal.getsignal(signal.Signals[name]) for name in NAMES]


@pytest.fixture(autouse=True)
def _no_signal_is_ignored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SIGINT is ignored if the tests run in the background."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_signal_is_recorded_and_the_handlers_come_back(name: str) -> None:
    before = handlers()
    with StopRequest() as stop:
        assert stop.signal is None
        send(name)
        assert stop.signal == signal.Signals[name]
    assert handlers() == before


@pytest.mark.parametrize("second", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("first", NAMES)
def test_the_second_signal_ends_the_block(first: str, second: str) -> None:
    before = handlers()

    def both() -> None:
        send(first)
        send(second)
        raise AssertionError("the second signal did not end this block")

    with pytest.raises(Signalled) as raised, StopRequest():
        both()
    assert raised.value.status == 128 + signal.Signals[second]
    assert handlers() == before


@pytest.mark.skipif("SIGHUP" not in NAMES, reason="this system has no SIGHUP")
def test_a_closed_terminal_does_not_end_a_block_that_stops() -> None:
    with StopRequest() as stop:
        send("SIGHUP")
        send("SIGHUP")  # the system and the shell send one each
    assert stop.signal == signal.SIGHUP


def test_under_torchrun_a_second_signal_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    before = handlers()
    with StopRequest() as stop:
        send("SIGINT")
        send("SIGTERM")  # torchrun passes the Ctrl-C on
        assert stop.signal == signal.SIGTERM
    assert handlers() == before


def test_ctrl_c_before_the_training_ends_the_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cifar100, "load_data", lambda *_: send("SIGINT"))
    assert cifar100.main(TINY) == 130
    assert capsys.readouterr().err == "cifar100.py: interrupted; no checkpoint was saved\n"
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_while_a_checkpoint_is_saved_keeps_the_one_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step, synced, before = Training.step, [], handlers()

    def interrupted(self: Training, images: Tensor, labels: Tensor) -> None:
        if self.step_count == 5:  # the checkpoint has 4 steps
            send("SIGINT")
        step(self, images, labels)

    def sync(_: int) -> None:
        synced.append(1)
        if len(synced) == 3:  # of config.json, and of two checkpoints
            send("SIGTERM")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Training, "step", interrupted)
    monkeypatch.setattr(os, "fsync", sync)
    assert cifar100.main(TINY) == 143
    checkpoint = only(Path(), "runs/*/checkpoint.pt")
    said = capsys.readouterr().err.splitlines()[-1]
    lost = "the training since the last checkpoint is lost"
    assert said == f"cifar100.py: terminated; {lost}; to go on: python {sys.argv[0]} --resume '{checkpoint}'"
    assert torch.load(checkpoint, weights_only=True)["training"]["step"] == 4
    assert [path for path in checkpoint.parent.iterdir() if path.suffix == ".tmp"] == []
    assert handlers() == before

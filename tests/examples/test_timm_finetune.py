"""The example with timm."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.examples.runs import whole_and_resumed
from tests.training import same_state

pytest.importorskip("timm", reason="timm is missing: pip install 'feather_param[integrations]'")

from examples import timm_finetune


def test_an_interrupted_and_resumed_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timm_finetune, "EPOCHS", 3)
    monkeypatch.setattr(timm_finetune, "DENSE_EPOCHS", 0)
    few = [array[:400] for array in timm_finetune.load_digits(return_X_y=True)]
    monkeypatch.setattr(timm_finetune, "load_digits", lambda return_X_y: few)
    files = whole_and_resumed(timm_finetune, "runs/timm/sparse.safetensors", tmp_path, monkeypatch)
    assert same_state(*files)
    printed = capsys.readouterr().out
    assert printed.count("epoch ") == 6
    assert len(re.findall(r"^accuracy [\d.]+%, 334,152 zeros of 371,280 weights$", printed, re.MULTILINE)) == 2
    weights = [value for value in files[0].values() if value.dim() >= 2]
    assert sum(int((weight == 0).sum()) for weight in weights) == 334_152


def test_the_script_is_short() -> None:
    assert len(Path(timm_finetune.__file__).read_text(encoding="utf-8").splitlines()) < 85


def test_fewer_than_one_epoch_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        timm_finetune.main(["--epochs", "0"])
    assert "expected --epochs to be at least 1, got 0" in capsys.readouterr().err

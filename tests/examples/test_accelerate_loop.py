"""The example with accelerate."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.examples.runs import whole_and_resumed
from tests.training import same_state

pytest.importorskip("accelerate", reason="accelerate is missing: pip install 'feather_param[integrations]'")

from examples import accelerate_loop


def test_an_interrupted_and_resumed_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accelerate_loop, "EPOCHS", 4)
    files = whole_and_resumed(accelerate_loop, "runs/accelerate/sparse.safetensors", tmp_path, monkeypatch)
    assert same_state(*files)
    printed = capsys.readouterr().out
    assert printed.count("epoch ") == 8
    found = re.findall(r"test accuracy ([\d.]+)%, 80,256 zeros of 84,480 weights", printed)
    assert len(found) == 2
    assert float(found[0]) > 50
    weights = [value for name, value in files[0].items() if name.endswith("weight")]
    assert sum(int((weight == 0).sum()) for weight in weights) == 80_256


def test_the_script_is_short() -> None:
    assert len(Path(accelerate_loop.__file__).read_text(encoding="utf-8").splitlines()) < 85


def test_fewer_than_one_epoch_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accelerate_loop.main(["--epochs", "0"])
    assert "expected --epochs to be at least 1, got 0" in capsys.readouterr().err

"""The demo, and the minimal example."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from examples import demo
from feather_param import load_sparse
from tests.examples.runs import RATE


def test_the_demo_compares_a_dense_and_a_sparse_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "RATE", RATE)  # 95 % in so few steps leaves dead layers, and warns
    assert demo.main(epochs=1) == 0
    assert Path("runs/demo/demo.png").stat().st_size > 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["test", "dense", "sparse", "picture:"]


def test_the_minimal_example_reaches_95_percent_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    script = Path(demo.__file__).parent / "minimal.py"
    runpy.run_path(str(script))
    found = re.search(r"95\.000%.*test accuracy ([\d.]+)%, file ([\d.]+) kB", capsys.readouterr().out, re.DOTALL)
    assert found
    assert float(found[1]) > 90
    assert float(found[2]) < 100
    weights = [value for name, value in load_sparse("digits.safetensors").items() if name.endswith("weight")]
    assert sum(int((weight == 0).sum()) for weight in weights) == round(0.95 * sum(w.numel() for w in weights))
    assert len(script.read_text(encoding="utf-8").splitlines()) < 40

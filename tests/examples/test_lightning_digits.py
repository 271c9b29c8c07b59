"""The example of Lightning."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("lightning", reason="lightning is missing; it needs feather_param[integrations]")

from feather_param import load_sparse

SCRIPT = Path(__file__).parents[2] / "examples" / "lightning_digits.py"


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_training_reaches_95_percent_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(SCRIPT)])
    runpy.run_path(str(SCRIPT))
    found = re.search(
        r"accuracy ([\d.]+)%, 80,256 of 84,480 weights are zero, file ([\d.]+) kB", capsys.readouterr().out
    )
    assert found
    assert float(found[1]) > 95
    assert float(found[2]) < 40
    weights = [
        value for name, value in load_sparse("runs/lightning/sparse.safetensors").items() if name.endswith("weight")
    ]
    assert sum(int((weight == 0).sum()) for weight in weights) == 80_256
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) <= 70

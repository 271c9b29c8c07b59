"""The example with the Trainer of transformers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers needs feather_param[integrations]")

from examples import hf_text_classification


def test_the_example_resumes_and_saves_a_model_with_90_percent_zeros(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hf_text_classification.main(["--epochs", "1", "--folder", str(tmp_path)]) == 0
    assert hf_text_classification.main(["--epochs", "2", "--resume", "--folder", str(tmp_path)]) == 0
    assert len(re.findall(r"test accuracy [\d.]+%, .* \(90\.00%\)", capsys.readouterr().out)) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-45", "checkpoint-90", "sparse"}
    assert len(Path(hf_text_classification.__file__).read_text(encoding="utf-8").splitlines()) <= 90


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "expected --epochs to be at least 1, got 0"),
        (["--resume", "--folder", "missing"], "expected a checkpoint in missing to resume, found none"),
    ],
)
def test_wrong_options_end_with_a_message(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        hf_text_classification.main(options)
    assert message in capsys.readouterr().err

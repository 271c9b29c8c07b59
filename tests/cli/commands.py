"""Checkpoint files of all kinds, and how a command ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import safetensors.torch
import torch

import feather_param

ROOT = Path(__file__).resolve().parents[2]
BENCH = ["--arch", "torch.nn:Linear", "in_features=50", "out_features=40", "bias=False"]


def state() -> dict[str, torch.Tensor]:
    """Return weights with 90 %, 50 % and no zeros, a tied one, and tensors that are no weights."""
    generator = torch.Generator().manual_seed(0)

    def pruned(rate: float, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        values = 1 + torch.rand(shape, generator=generator)
        return torch.where(torch.rand(shape, generator=generator) < rate, 0.0, values).to(dtype)

    weight = pruned(0.9, 40, 50)
    others = {"norm.weight": torch.zeros(16), "norm.count": torch.tensor(7), "empty": torch.zeros(0, 4)}
    dense = {"half.weight": pruned(0.5, 8, 3, 3, 3, dtype=torch.bfloat16), "dense.weight": pruned(0.0, 4, 4)}
    return {"fc.weight": weight, "tied.weight": weight, **dense, **others}


TENSORS = state()
ZEROS = {name: int((TENSORS[name] == 0).sum()) for name in ("fc.weight", "half.weight", "dense.weight", "empty")}

KINDS: dict[str, Callable[[Path], None]] = {
    "torch": lambda path: torch.save(TENSORS, path),
    "legacy": lambda path: torch.save(TENSORS, path, _use_new_zipfile_serialization=False),
    "state_dict": lambda path: torch.save({"state_dict": TENSORS, "epoch": 3}, path),
    "model": lambda path: torch.save({"rng": torch.zeros(3), "model": TENSORS}, path),
    "model_state_dict": lambda path: torch.save({"model_state_dict": TENSORS}, path),
    "safetensors": lambda path: safetensors.torch.save_file({k: v.clone() for k, v in TENSORS.items()}, path),
    "sparse": lambda path: feather_param.save_sparse(TENSORS, path),
    "sparse zstd": lambda path: feather_param.save_sparse(TENSORS, path, zstd=True),
}


def done(result: SimpleNamespace) -> str:
    assert (result.status, result.err) == (0, "")
    return result.out


def fails(result: SimpleNamespace, status: int, message: str) -> None:
    assert result.out == ""
    assert result.err.startswith("feather-param: error: ")
    assert result.err.count("\n") == 1, result.err
    assert message in result.err
    assert result.status == status


def process(*argv: object, **options) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "feather_param", *map(str, argv)]
    return subprocess.Popen(
        command, env=env, text=True, stderr=subprocess.PIPE, **{"stdout": subprocess.PIPE, **options}
    )

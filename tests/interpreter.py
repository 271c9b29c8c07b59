"""Run a check of Triton kernels on a CPU, by triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def interpret(check: Callable[[], None]) -> None:
    """Call a function of a test module in a new process.

    Triton chooses between interpreter and compiler when it is imported.
    """
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", f"from {check.__module__} import {check.__name__} as check; check()"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

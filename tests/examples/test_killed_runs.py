"""A run that is killed 20 times ends bit for bit like one that is not killed, with nothing left over."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that forks")
def test_a_run_that_is_killed_20_times_ends_like_one_that_is_not(tmp_path: Path) -> None:
    # Forks need a process of one thread, which those of the tests are not.
    command = [sys.executable, "-m", "tests.examples.kills", "20", "6"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(\w+), (\d+) killed", done.stdout, re.MULTILINE) == [("cifar100", "20"), ("imagenet", "6")]

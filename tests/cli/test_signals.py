"""A command that a signal ends leaves the old file, and no other. A table of commands, signals and moments."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import ROOT
from tests.cli.killed import COMMANDS, SIGNALS, cases

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")

ENDED = {"SIGINT": (130, "interrupted"), "SIGTERM": (143, "terminated"), "SIGHUP": (129, "hung up")}
SCRIPTS = {
    "python -m": ["-m", "feather_param"],
    "cifar100.py": ["examples/cifar100.py"],
    "imagenet.py": ["examples/imagenet.py"],
    "demo.py": ["examples/demo.py"],
    "cifar100_table": ["-m", "benchmarks.cifar100_table"],
    "benchmarks.gpu": ["-m", "benchmarks.gpu"],
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[tuple[str, ...], dict[str, Any]]:
    """Return how the commands ended."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.cli.killed", str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(list(cases()))
    return {tuple(result["case"]): result for result in results}


@pytest.mark.parametrize("moment", ["write", "fsync"])
@pytest.mark.parametrize("name", ENDED)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_ends_a_command_with_one_line_and_the_old_file(command, name, moment, ends):
    status, word = ENDED[name]
    end = ends[command, name, moment]
    assert (end["status"], end["said"]) == (status, f"feather-param: error: {word}\n")
    assert (end["old"], end["left"]) == (True, [])


@pytest.mark.parametrize("moment", ["write", "fsync"])
@pytest.mark.parametrize("command", COMMANDS)
def test_kill_leaves_the_old_file(command, moment, ends):
    end = ends[command, "SIGKILL", moment]
    assert (end["status"], end["said"], end["old"]) == (-signal.SIGKILL, "", True)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_next_write_removes_what_kill_left(command, ends):
    end = ends[command, "SIGKILL", "killed"]
    assert (end["old"], end["left"]) == (False, [])


@pytest.mark.parametrize("command", COMMANDS)
def test_more_signals_do_not_disturb_the_end(command, ends):
    end = ends[command, "SIGTERM", "again"]
    assert (end["status"], end["said"]) == (143, "feather-param: error: terminated\n")
    assert (end["old"], end["left"]) == (True, [])


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_an_ignored_signal_stays_ignored(name, ends):
    end = ends["compress", name, "ignored"]
    assert (end["status"], end["old"], end["left"]) == (0, False, [])


def test_the_table_has_all_signals(ends):
    assert {name for _, name, _ in ends} == {*SIGNALS} == {*ENDED, "SIGKILL"}


@pytest.fixture
def slow_torch(tmp_path) -> Path:
    """Return a folder with a package torch whose import says so, never ends, and loses exceptions.

    It also has another release of this library. The programs use the one of the repository.
    """
    (tmp_path / "feather_param.py").write_text("raise ImportError('another release')", encoding="utf-8")
    (tmp_path / "torch").mkdir()
    lines = ["import time", "print('importing', flush=True)", "while True:", "    try:", "        time.sleep(60)"]
    lines += ["    except BaseException:", "        pass"]
    (tmp_path / "torch" / "__init__.py").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def console_script() -> list[str]:
    """Return the arguments of Python that do what the installed command does."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    module, function = re.findall(r'^feather-param = "(.+):(.+)"$', text, re.MULTILINE)[0]
    return ["-c", f"import sys; from {module} import {function}; sys.exit({function}())"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("program", ["console script", *SCRIPTS])
def test_a_signal_during_the_import_of_torch_ends_the_program_quietly(program, name, slow_torch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child would go on ignoring it
    try:
        running = subprocess.Popen(
            [sys.executable, *(SCRIPTS.get(program) or console_script())],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(slow_torch)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert running.stdout is not None
    assert running.stdout.readline() == "importing\n"
    running.send_signal(signal.Signals[name])
    try:
        _, said = running.communicate(timeout=60)
    finally:
        running.kill()
    assert (running.returncode, said) == ({"SIGINT": 130, "SIGTERM": -signal.SIGTERM}[name], "")

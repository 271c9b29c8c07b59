"""Part a: the tests that need a GPU, with the real compiler of triton. A piece is a test file, in a process of its own.

A crash therefore costs one file, and so does a hang: each process leaves the expected time of the later ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.budget import MARGIN, Call, Figures, Part, Piece
from benchmarks.gpu.sizes import Sizes

__all__ = ["part"]

ROOT = Path(__file__).resolve().parents[2]
_TEXT = 2000  # characters of the message of a failure


def part(sizes: Sizes) -> Part:
    """Return the part."""
    pieces = []
    for i, (file, options, seconds) in enumerate(sizes.tests):
        later = sizes.pace * sum(expected for *_, expected in sizes.tests[i + 1 :])
        make = partial(_check, file, options, MARGIN * later)
        pieces.append(Piece(file, sizes.pace * seconds, "start of a process, and its tests", make))
    return Part("a", "Tests that need a GPU", "a_checks.json", lambda records, room: pieces, most=180.0)


def _check(file: str, options: Sequence[str], later: float, call: Call) -> Figures:
    """Run a test file, and return the counts and the failures.

    Args:
        file: the file.
        options: further arguments of pytest.
        later: the seconds to leave to the later files.
        call: the call, whose remaining time is the limit.

    Raises:
        RuntimeError: the process crashed, or the time was over. The message has the last lines of its output.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report, output = Path(scratch) / "report.xml", Path(scratch) / "output.txt"
        command = [sys.executable, "-m", "pytest", file, *options, "-v", "-p", "no:cacheprovider"]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        with output.open("wb") as sink:
            try:
                status = subprocess.run(
                    [*command, f"--junitxml={report}"],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    timeout=max(1.0, call.left() - later),
                ).returncode
            except subprocess.TimeoutExpired:
                status = None
        text = output.read_text(encoding="utf-8", errors="replace")
        if not report.is_file():
            what = "did not end in time" if status is None else f"ended with status {status} and without a report"
            raise RuntimeError(f"{file} {what}; its output ends with:\n{text[-_TEXT:]}")
        return _counts(report)


def _counts(report: Path) -> dict[str, Any]:
    """Return the counts, the time and the failures of a JUnit report."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    suites = ElementTree.parse(report).getroot()
    for case in suites.iter("testcase"):
        bad = [found for found in (case.find("failure"), case.find("error")) if found is not None]
        outcome = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        counts[outcome] += 1
        for found in bad:
            message = found.get("message") or found.text or ""
            failures.append({"test": f"{case.get('classname')}::{case.get('name')}", "message": message[:_TEXT]})
    seconds = sum(float(suite.get("time", 0.0)) for suite in suites.iter("testsuite"))
    return {**counts, "test seconds": seconds, "failures": failures}

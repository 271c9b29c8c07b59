"""Progress is for terminals."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from feather_param.cli import main as cli
from feather_param.cli import progress
from feather_param.files import sizes
from tests.cli.commands import KINDS, done


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_shows_on_terminals_only_and_leaves_nothing(run, monkeypatch, capsys):
    KINDS["torch"](Path("in.pt"))
    assert done(run("report", "in.pt"))  # no terminal: nothing on stderr
    monkeypatch.setattr(sizes, "_CHUNK", 64)
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(["report", "in.pt"]) == 0
    assert "\r" not in capsys.readouterr().out
    shown = [line.strip() for line in terminal.getvalue().split("\r")]
    assert terminal.getvalue().endswith("\r")
    assert shown[-2:] == ["", ""]  # blanks over the last line
    assert {"reading ...", "sparse ...", "sparse + zstd ..."} <= set(shown)
    last = [line for line in shown if line.startswith("gzip: 100%")][-1]
    assert re.search(r"\| [\d.]+%/s, 00:00 left$", last), last


def test_an_error_removes_the_progress(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(["report", "missing"]) == 1
    *shown, last = terminal.getvalue().split("\r")
    assert shown[-1].strip() == ""
    assert last == "feather-param: error: missing: No such file or directory\n"

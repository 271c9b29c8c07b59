"""Commands run in an empty folder."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from feather_param.cli import main as cli


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(name="run")
def _run(capsys):
    def run(*argv: object) -> SimpleNamespace:
        status = cli.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run

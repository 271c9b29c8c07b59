"""The command is installed, and its documentation is right."""

from __future__ import annotations

import importlib.metadata
import re
import shlex

from feather_param import __main__
from feather_param.cli import main as cli
from tests.cli.commands import ROOT, done

DOCS = (ROOT / "docs" / "feather-param-command.md").read_text(encoding="utf-8")


def test_the_command_is_installed():
    installed = importlib.metadata.distributions(name="feather_param")
    scripts = [script for package in installed for script in package.entry_points if script.name == "feather-param"]
    assert [script.load() for script in scripts[:1]] == [__main__.main]
    assert cli.main(["--version"]) == 0


def masked(text: str) -> str:
    """Without numbers that depend on the versions of torch, zlib and zstandard, and the blanks around them."""
    return re.sub(r" +", " ", re.sub(r"[\d,.]+( bytes|%)", r"N\1", text))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


def test_the_documented_session_runs_as_shown(run):
    (code,) = blocks("python")
    exec(compile(code, "feather-param-command.md", "exec"), {})
    shown = 0
    for session in blocks("console"):
        for part in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            program, *argv = shlex.split(command)
            assert program == "feather-param"
            assert masked(done(run(*argv))) == masked(expected), command
            shown += 1
    assert shown >= 4


def test_every_option_is_documented(run):
    helps = [
        done(run(*command, "--help")) for command in ([], ["report"], ["bake"], ["compress"], ["expand"], ["bench"])
    ]
    options = {option for text in helps for option in re.findall(r"--[a-z][a-z-]+", text)} - {"--help"}
    assert options == set(re.findall(r"--[a-z][a-z-]+", DOCS))
    statuses = ["0 done", "1 a file cannot be processed", "2 wrong usage"]
    statuses += ["129 hung up", "130 interrupted", "141 nobody reads", "143 terminated"]
    for status in statuses:
        assert status in helps[0]
        assert re.search(rf"^\| (\d+, )*{status.split()[0]}(, \d+)* \|", DOCS, re.MULTILINE), status

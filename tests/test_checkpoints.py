"""The page about checkpoints: its code runs, and a checkpoint ends in a plain model with exact zeros."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import feather_param
from feather_param.cli.main import main
from tests.training import same_state

PAGE = Path(__file__).parent.parent.joinpath("docs", "checkpoints.md").read_text(encoding="utf-8")


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))


def block(text: str, language: str = "python") -> str:
    """Return the only block of the page that holds a text."""
    (found,) = [each for each in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if text in each]
    return found


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def trained(steps: int = 1, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD):
    torch.manual_seed(0)
    model = build()
    controller = feather_param.sparsify(model, final_rate=0.95, total_steps=4)
    own = optimizer(model.parameters(), lr=0.1)
    for _ in range(steps):
        own.zero_grad()
        model(torch.ones(3, 12)).square().sum().backward()
        own.step()
        controller.step()
    return model, own, controller


def test_the_files_load_as_the_page_says(capsys):
    model, _, _ = trained(4)
    expected = {name: value.clone() for name, value in feather_param.baked_state_dict(model).items()}
    exec(block("plain.pt"), {"model": model, "torch": torch, "feather_param": feather_param})
    scope = {"build": build, "torch": torch, "feather_param": feather_param}
    exec(block("plain.load_state_dict"), scope)
    assert same_state(scope["plain"].state_dict(), expected)
    for state in (torch.load("plain.pt"), feather_param.load_sparse("sparse.safetensors")):
        build().load_state_dict(state)
        other, _, _ = trained(0)
        other.load_state_dict(state)
        assert same_state(state, expected)
    resumed, _, controller = trained(0)
    resumed.load_state_dict(torch.load("training.pt"))
    assert controller.step_count == 4
    _, *arguments = shlex.split(block("feather-param bake", "sh"))
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""


def test_the_keys_are_those_of_the_page():
    model, _, _ = trained()
    keys = re.findall(r"^\| `(0\.[^`]*)`", PAGE, re.MULTILINE)
    assert set(model.state_dict()) - set(build().state_dict()) == {*keys, keys[0].replace("0.", "2.", 1)}


def test_the_code_that_resumes_runs():
    model, optimizer, controller = trained()
    parts = {"model": model, "optimizer": optimizer, "controller": controller}
    torch.save({name: part.state_dict() for name, part in parts.items()}, "checkpoint.pt")
    scope = {"build": build, "total": 4, "torch": torch, "feather_param": feather_param}
    exec(block("checkpoint.pt"), scope)
    assert scope["controller"].state_dict() == controller.state_dict()
    assert torch.equal(scope["model"][0].weight, model[0].weight)

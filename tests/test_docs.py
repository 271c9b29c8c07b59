"""What the documentation shows runs as it stands."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import feather_param

ROOT = Path(__file__).parent.parent
MODULES = [module.name for module in pkgutil.walk_packages(feather_param.__path__, "feather_param.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    if name.endswith(".kernels"):
        pytest.importorskip("triton")  # which only torch's CUDA builds bring
    module = importlib.import_module(name)
    torch.manual_seed(0)
    failed, _ = doctest.testmod(module, extraglobs={"torch": torch, "nn": torch.nn, "feather_param": feather_param})
    assert failed == 0


def test_public_functions_have_an_example():
    for name in feather_param.__all__:
        thing = getattr(feather_param, name)
        if callable(thing) and not isinstance(thing, type):
            assert ">>>" in thing.__doc__, name


def test_the_readmes_loop_runs(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "sparsify(" in code]
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 12), torch.nn.ReLU(), torch.nn.Linear(12, 12))
    data = torch.utils.data.TensorDataset(torch.randn(64, 3, 2, 2), torch.randint(4, (64,)))
    scope = {"model": model, "loader": torch.utils.data.DataLoader(data, batch_size=16), "epochs": 3}
    exec(compile(block.replace("+ ", "  "), "README.md", "exec"), scope)
    state = torch.load(tmp_path / "sparse.pt")
    zeros = sum(int((value == 0).sum()) for name, value in state.items() if name.endswith("weight"))
    assert zeros == round(0.95 * 2 * 12 * 12)


def test_the_documented_way_to_resume_runs(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "works-with.md").read_text(encoding="utf-8")
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "checkpoint.pt" in code]
    monkeypatch.chdir(tmp_path)

    def build() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.ReLU(), torch.nn.Linear(12, 12))

    model = build()
    controller = feather_param.sparsify(model, final_rate=0.95, total_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller.step()
    state = {"model": model, "optimizer": optimizer, "controller": controller}
    torch.save({name: thing.state_dict() for name, thing in state.items()}, "checkpoint.pt")
    scope = {"build": build, "total": 4, "torch": torch, "feather_param": feather_param}
    exec(compile(block, "works-with.md", "exec"), scope)
    assert scope["controller"].state_dict() == controller.state_dict()
    assert torch.equal(scope["model"][0].weight, model[0].weight)


def test_the_documented_way_to_fine_tune_a_sparse_file_runs(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "works-with.md").read_text(encoding="utf-8")
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "load_sparse" in code]
    monkeypatch.chdir(tmp_path)

    def build() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.ReLU(), torch.nn.Linear(12, 12))

    def train(model: torch.nn.Module, controller: feather_param.Controller) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.ones(3, 12)).square().sum().backward()
            optimizer.step()
            controller.step()

    model = build()
    feather_param.sparsify(model, final_rate=0.95, total_steps=1, end_step=0)
    feather_param.desparsify(model)
    feather_param.save_sparse(model, "sparse.safetensors")
    scope = {"build": build, "train": train, "total": 4, "feather_param": feather_param}
    exec(compile(block, "works-with.md", "exec"), scope)
    tuned = scope["model"]
    for i in (0, 2):
        assert torch.equal(tuned[i].weight != 0, model[i].weight != 0)
        assert not torch.equal(tuned[i].bias, model[i].bias)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120

"""The documentation: its code runs, and its links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import archs
import feather_param

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
MODULES = [module.name for module in pkgutil.walk_packages(feather_param.__path__, "feather_param.")]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # lightning
@pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")  # lightning
def test_the_examples_of_a_modules_docstrings_run(name):
    if name.endswith("_triton"):
        pytest.importorskip("triton")  # only builds of torch for CUDA install it
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if ".integrations." not in name:
            raise
        pytest.skip(str(error))
    torch.manual_seed(0)
    failed, _ = doctest.testmod(module, extraglobs={"torch": torch, "nn": torch.nn, "feather_param": feather_param})
    assert failed == 0


def test_each_public_function_has_an_example():
    for name in feather_param.__all__:
        thing = getattr(feather_param, name)
        if callable(thing) and not isinstance(thing, type):
            assert ">>>" in thing.__doc__, name


def code_with(call: str, page: str) -> str:
    """Return the only block of Python code of a page that holds a text."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [block for block in blocks if call in block]
    return found


def build() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.ReLU(), torch.nn.Linear(12, 12))


def test_the_training_loop_of_the_readme_runs(tmp_path, monkeypatch):
    block = code_with("sparsify(", "README.md")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 12), torch.nn.ReLU(), torch.nn.Linear(12, 12))
    data = torch.utils.data.TensorDataset(torch.randn(64, 3, 2, 2), torch.randint(4, (64,)))
    scope = {"model": model, "loader": torch.utils.data.DataLoader(data, batch_size=16), "epochs": 3}
    exec(compile(block, "README.md", "exec"), scope)
    state = torch.load(tmp_path / "sparse.pt")
    zeros = sum(int((value == 0).sum()) for name, value in state.items() if name.endswith("weight"))
    assert zeros == round(0.95 * 2 * 12 * 12)


def test_the_code_that_resumes_a_training_runs(tmp_path, monkeypatch):
    block = code_with("checkpoint.pt", "docs/checkpoints.md")
    monkeypatch.chdir(tmp_path)

    model = build()
    controller = feather_param.sparsify(model, final_rate=0.95, total_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller.step()
    state = {"model": model, "optimizer": optimizer, "controller": controller}
    torch.save({name: thing.state_dict() for name, thing in state.items()}, "checkpoint.pt")
    scope = {"build": build, "total": 4, "torch": torch, "feather_param": feather_param}
    exec(compile(block, "checkpoints.md", "exec"), scope)
    assert scope["controller"].state_dict() == controller.state_dict()
    assert torch.equal(scope["model"][0].weight, model[0].weight)


def test_the_code_that_fine_tunes_a_sparse_file_runs(tmp_path, monkeypatch):
    block = code_with("load_sparse", "docs/loops.md")
    monkeypatch.chdir(tmp_path)

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
    exec(compile(block, "loops.md", "exec"), scope)
    tuned = scope["model"]
    for i in (0, 2):
        assert torch.equal(tuned[i].weight != 0, model[i].weight != 0)
        assert not torch.equal(tuned[i].bias, model[i].bias)


@pytest.mark.filterwarnings("ignore:nothing survives")
def test_the_code_about_allocations_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/allocations.md").read_text(encoding="utf-8"), re.DOTALL)
    scope = {"feather_param": feather_param}
    for block in blocks:
        scope["model"] = archs.resnet20(width=4)
        if "*.depthwise" in block:
            scope["model"] = archs.mobilenet_v1()
        exec(compile(block, "allocations.md", "exec"), scope)
    for name in ("allocation", "last_layer_dense"):
        plan = feather_param.plan(archs.resnet20(width=4), final_rate=0.9, allocation=scope[name])
        assert sum(row.zeros for row in plan.rows) == plan.zeros
    assert plan.rows[-1].zeros == 0


def test_the_readme_has_fewer_than_120_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120


def without_blocks(page: Path) -> str:
    """Return the text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *$", without_blocks(page), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_link_of_a_page_leads_to_a_file_and_a_heading(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", without_blocks(page))):
        if re.match(r"[a-z]+:", link):  # of another site
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors_of(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_file_that_a_page_names_exists(page):
    folders = "feather_param|archs|examples|benchmarks|tests|docs"
    names = re.findall(rf"`((?:{folders})/[\w/.-]+)`", page.read_text(encoding="utf-8"))
    assert [name for name in names if not (ROOT / name).exists()] == []

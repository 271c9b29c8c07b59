"""Each block of Python code of the documentation runs, page by page in one namespace.

A block of ```py instead of ```python is a fragment: it compiles.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import feather_param
from tests.page_preludes import PRELUDES, SHORTENED

ROOT = Path(__file__).parent.parent
PAGES = sorted(str(page.relative_to(ROOT)) for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TESTS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
NEEDED = re.compile(r"^(?:import|from) (onnxruntime|lightning|schedulefree|torch_pruning|transformers)", re.MULTILINE)

pytestmark = [
    pytest.mark.filterwarnings("ignore:nothing survives"),  # the networks of the preludes are small
    pytest.mark.filterwarnings("ignore:expected (desparsify|freeze)"),  # a block is a piece of a training
    pytest.mark.filterwarnings("ignore:sparsify prunes only"),
]


@pytest.fixture(autouse=True)
def no_group_of_processes_remains():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def blocks_of(page: str, languages: tuple[str, ...] = ("python",)) -> Iterator[tuple[str, str]]:
    """Yield the heading above each block of Python code, and the block."""
    section = ""
    pattern = re.compile(r"^#+ (?P<heading>[^\n]+)|^```(?P<language>\w*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
    for found in pattern.finditer((ROOT / page).read_text(encoding="utf-8")):
        if found["heading"]:
            section = found["heading"]
        elif found["language"] in languages:
            yield section, found["code"]


WITH_CODE = [page for page in PAGES if list(blocks_of(page))]


@pytest.mark.parametrize("page", WITH_CODE)
def test_each_block_of_code_compiles(page):
    for section, block in blocks_of(page, ("python", "py")):
        compile(block, f"{page}: {section}", "exec")


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_each_page_is_run_by_a_test(page):
    by_name = [path for path, text in TESTS.items() if Path(page).name in text and path != Path(__file__)]
    assert page in PRELUDES or by_name, f"give {page} a prelude in tests/page_preludes.py, or run its blocks in a test"


@pytest.mark.parametrize("page", PRELUDES)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text, shortened = SHORTENED.get(page, ("", ""))
    scope = {"torch": torch, "nn": nn, "feather_param": feather_param}
    last = skipped = None
    for section, block in blocks_of(page):
        if section != last:
            PRELUDES[page](section, scope)
            last = section
        if any(importlib.util.find_spec(name) is None for name in NEEDED.findall(block)):
            skipped = section  # the blocks that follow in this section need the package as well
        if section != skipped:
            exec(compile(block.replace(text, shortened) if text else block, f"{page}: {section}", "exec"), scope)

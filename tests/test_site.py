"""The documentation site: it builds without a warning, needs no network, and its reference has all public names."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import feather_param

ROOT = Path(__file__).parent.parent
MODULES = [
    *(f"feather_param.{name}" for name in ("schedules", "allocations", "patterns", "parametrizations", "inference")),
    "feather_param.reports",
    "feather_param.reports.figures",
    "feather_param.reports.scalars",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocstrings", reason="the site needs feather_param[docs]")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def documented() -> Iterator[str]:
    """Yield the names that the pages of the reference ask mkdocstrings for."""
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for name, options in re.findall(r"^::: (\S+)\n((?:    .*\n)*)", page.read_text(encoding="utf-8"), re.MULTILINE):
            heading = re.search(r"heading: (\S+)", options)  # of a function with the name of its module
            members = re.search(r"members: \[(.+)\]", options)
            if members:
                yield from (f"{name}.{member}" for member in members[1].split(", "))
            else:
                yield heading[1] if heading else name


def test_the_reference_has_each_public_name_once():
    expected = [f"feather_param.{name}" for name in feather_param.__all__]
    for module in MODULES:
        expected += [f"{module}.{name}" for name in importlib.import_module(module).__all__]
    modules = {name for name in expected if name in MODULES or isinstance(_value(name), type(re))}
    again = {"feather_param.inference.to_sparse_inference"}  # it is public in feather_param as well
    found = list(documented())
    assert sorted(set(expected) - modules - again - set(found)) == []
    assert len(found) == len(set(found))


def _value(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_the_site_loads_nothing_from_the_network(site):
    loaded = re.compile(
        r"<(?:script|img|iframe)[^>]*\ssrc=\"?(https?:)?//|<link[^>]*stylesheet[^>]*href=\"?(https?:)?//"
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    assert [page.name for page in pages if loaded.search(page.read_text(encoding="utf-8"))] == []


def test_the_search_works_from_a_folder(site):
    texts = (site / "search" / "search_index.js").read_text(encoding="utf-8").removeprefix("var __index = ")
    places = [entry["location"] for entry in json.loads(texts)["docs"] if "threshold" in entry["text"]]
    assert any(place.startswith("how-it-works.html") for place in places)
    assert 'src="javascripts/iframe-worker.js"' in (site / "index.html").read_text(encoding="utf-8")


def test_the_search_splits_the_keys_of_a_checkpoint(site):
    text = (site / "search" / "search_index.js").read_text(encoding="utf-8").removeprefix("var __index = ")
    separator = json.loads(text)["config"]["separator"]
    assert re.split(separator, "0.parametrizations.weight.original") == ["0", "parametrizations", "weight", "original"]
    assert re.split(separator, "final_rate=0.95") == ["final_rate", "0.95"]


def test_the_reference_has_no_markup_of_sphinx(site):
    for page in (site / "reference").glob("*.html"):
        assert not re.search(r":\w+:\W*<code>|\.\. \w+::", page.read_text(encoding="utf-8")), page.name


def test_files_outside_the_folder_of_the_pages_are_part_of_the_site(site):
    for path in ("benchmarks/index.html", "CHANGELOG.html", "CONTRIBUTING.html", "benchmarks/results/ten_layers.png"):
        assert (site / "repository" / path).is_file()
    text = (site / "choosing.html").read_text(encoding="utf-8")
    assert 'href="repository/benchmarks/index.html"' in text
    assert 'src="repository/benchmarks/results/ten_layers.png"' in text
    assert 'href="../../inference.html"' in (site / "repository/benchmarks/index.html").read_text(encoding="utf-8")


def test_examples_of_docstrings_are_code_and_not_quotations(site):
    for page in (site / "reference").glob("*.html"):
        assert "<blockquote>" not in page.read_text(encoding="utf-8"), page.name


def test_the_navigation_has_at_most_seven_entries(site):
    tabs = re.findall(r'class="md-tabs__item', (site / "index.html").read_text(encoding="utf-8"))
    assert 2 < len(tabs) <= 7


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_a_page_says_in_its_first_lines_what_it_is_for(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert lines[1] == ""
    assert re.match(r"\w|`[^`]", lines[2]), lines[2]


def test_the_pictures_are_drawn_by_the_script(tmp_path):
    pytest.importorskip("matplotlib", reason="the pictures need feather_param[plot]")
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures" / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    pictures.main(tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in (ROOT / "docs" / "pictures").glob("*.svg"))

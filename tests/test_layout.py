"""The layout of the repository: imports in one direction, short files, and public names."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

import feather_param

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "feather_param"


def module_of(path: Path) -> str:
    """Return the name of the module in a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, for type checking and inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name if name in MODULES else str(node.module) for name in names)
    return found & MODULES.keys()


def test_imports_of_the_package_have_no_circle():
    graphlib.TopologicalSorter({name: imports_of(path) for name, path in MODULES.items()}).prepare()


# Parts of the package: folders, and files beside them. A part may import its own layer and those before it. The folder
# files knows tensors but no models, so it may import less.
LAYERS = [
    {"utils"},
    {"ops"},
    {"allocations", "schedules"},
    {"patterns"},
    {"selection"},
    {"core", "parametrizations"},
    {"reports", "files"},
    {"controller", "api", "inference"},
    {"public"},
    {"__init__"},
    {"cli", "integrations"},
    {"__main__"},
]


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_a_module_imports_only_its_layer_and_those_before():
    wrong = {}
    for name, path in MODULES.items():
        part = part_of(name)
        layer = next(i for i, parts in enumerate(LAYERS) if part in parts)
        allowed = {"utils", "ops", "files"} if part == "files" else set().union(*LAYERS[: layer + 1])
        if found := {part_of(module) for module in imports_of(path)} - allowed:
            wrong[name] = found
    assert wrong == {}


def test_no_module_below_the_public_names_asks_the_package_for_them():
    """The package would import all public names, and so the module itself a second time: a circle."""
    above = {"public", "__init__", "cli", "integrations", "__main__"}
    for name, path in MODULES.items():
        if part_of(name) not in above:
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            assert not any(isinstance(node, ast.ImportFrom) and node.module == "feather_param" for node in nodes), path


def test_no_python_file_has_more_than_350_lines():
    folders = ("feather_param", "archs", "examples", "benchmarks", "tests")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: count for name, count in lines.items() if count > 350} == {}


def test_the_package_has_at_most_ten_files_beside_its_folders():
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 10


def test_dir_of_the_package_shows_the_public_names_only():
    assert sorted(dir(feather_param)) == sorted([*feather_param.__all__, "__version__"])


@pytest.mark.parametrize("module", [feather_param, feather_param.reports, feather_param.inference])
def test_each_public_name_exists(module):
    assert [name for name in module.__all__ if not hasattr(module, name)] == []

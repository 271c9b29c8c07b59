"""The notebook of the documentation: it runs, its outputs are stored, and it becomes a page."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "notebooks" / "pretrained_to_small_file.ipynb"


def load(path: str) -> ModuleType:
    """Return a script of the documentation as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts(notebook: dict) -> list[str]:
    """Return the texts and code of a notebook and its outputs, without pictures."""
    found = []
    for cell in notebook["cells"]:
        found.append("".join(cell["source"]))
        for output in cell.get("outputs", []):
            found.append("".join(output.get("text", output.get("data", {}).get("text/plain", ""))))
    return found


@pytest.fixture(scope="module")
def stored() -> dict:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient", reason="needs feather_param[dev]")
    pytest.importorskip("ipykernel", reason="needs feather_param[dev]")
    if importlib.util.find_spec("torchcrepe") is None:
        pytest.skip("needs torchcrepe (feather_param[examples])")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = load("docs/notebooks/execute.py").execute(NOTEBOOK, steps=4, count=30)
    printed = "\n".join(texts(notebook))
    assert re.search(r"^all +485,376 +436,838 +90\.000%", printed, re.MULTILINE)
    assert "the loaded network is equal: True" in printed
    assert "count = 30" in printed


def test_another_value_for_an_unknown_parameter_is_refused() -> None:
    pytest.importorskip("nbclient", reason="needs feather_param[dev]")
    with pytest.raises(ValueError, match="expected a line that sets epochs in the cell of parameters"):
        load("docs/notebooks/execute.py").execute(NOTEBOOK, epochs=1)


def test_the_stored_notebook_was_run_from_top_to_bottom(stored: dict) -> None:
    cells = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4


def test_the_stored_notebook_names_no_machine(stored: dict) -> None:
    assert not [text for text in texts(stored) if re.search(r"/(home|root|tmp|usr|Users|work)/|\\\\", text)]
    assert stored["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert {key for cell in stored["cells"] for key in cell["metadata"]} <= {"tags"}


def test_each_cell_of_code_is_short(stored: dict) -> None:
    cells = ["".join(cell["source"]) for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert max(len(cell.splitlines()) for cell in cells) <= 20


def test_the_notebook_becomes_a_page_with_its_pictures(stored: dict) -> None:
    pytest.importorskip("mkdocs", reason="needs feather_param[docs]")
    page, pictures = load("docs/hooks/notebooks.py").to_page(stored, "name")
    assert page.startswith("# From a pretrained network to a small, fast file\n")
    assert list(pictures) == [f"name_{i}.png" for i in range(1, 5)]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())
    assert re.findall(r"!\[(.+)\]\((.+)\)", page)[0] == ("The pretrained network", "name_1.png")
    assert "```python\nrate = 0.9" in page
    assert "```text\npretrained: " in page
    assert "<Figure" not in page
    assert "plt.subplots" not in page
    assert page.endswith("[name.ipynb](name.ipynb), without the code that draws the pictures.\n")


def test_the_site_has_the_page_and_the_pictures(tmp_path: Path) -> None:
    config = pytest.importorskip("mkdocs.config", reason="needs feather_param[docs]")
    build = pytest.importorskip("mkdocs.commands.build")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[The notebook](a.md)", encoding="utf-8")
    (tmp_path / "docs" / "a.ipynb").write_bytes(NOTEBOOK.read_bytes())
    settings = {"site_name": "name", "theme": {"name": None, "custom_dir": "theme"}, "plugins": []}
    settings |= {"hooks": [str(ROOT / "docs/hooks/notebooks.py")]}
    (tmp_path / "theme").mkdir()
    (tmp_path / "theme" / "main.html").write_text("{{ page.content }}", encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text(json.dumps(settings), encoding="utf-8")
    build.build(config.load_config(str(tmp_path / "mkdocs.yml")))
    page = (tmp_path / "site" / "a" / "index.html").read_text(encoding="utf-8")
    assert '<img alt="The pretrained network" src="../a_1.png"' in page
    assert (tmp_path / "site" / "a_1.png").read_bytes().startswith(b"\x89PNG")

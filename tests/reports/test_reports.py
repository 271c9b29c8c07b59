"""The public path of the reports, what its functions refuse, and its documentation."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import feather_param
from feather_param import reports as public
from feather_param.reports import figures, page, scalars
from tests.reports.models import loss, network
from tests.reports.pages import checked
from tests.training import train

ROOT = Path(__file__).resolve().parents[2]


def test_reports_list_their_names():
    assert {name for name in public.__all__ if not hasattr(public, name)} == set()
    assert public.multiply_adds.__name__ == "multiply_adds"  # the function, not the module


def test_importing_reports_imports_no_matplotlib():
    code = "import sys, feather_param.reports; print([name for name in sys.modules if 'matplotlib' in name])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"


def test_reports_name_the_call_that_makes_the_expected_argument(reports):
    report, history, counted = reports
    for call, message in [
        (lambda: page(history), r"expected a Report from controller\.report\(\), got History"),
        (lambda: figures.draw(history), r"expected a Report from controller\.report\(\), got History"),
        (lambda: page(None), r"expected a Report from .*, got NoneType"),
        (lambda: page(report, history=counted), r"expected a History from History\(controller\), got MultiplyAdds"),
        (lambda: figures.draw(report, multiply_adds=history), r"expected a MultiplyAdds from .*, got History"),
        (lambda: scalars.log_report(print, None, 1), r"expected a Report from .*, got NoneType"),
        (lambda: scalars.log_record(print, history), r"expected a Record from history\.records, got History"),
        (lambda: scalars.log_multiply_adds(print, report, 1), r"expected a MultiplyAdds from .*, got Report"),
    ]:
        with pytest.raises(TypeError, match=message):
            call()


@pytest.mark.filterwarnings("ignore:nothing survives")  # of so small a network, at the documented rate
def test_the_documented_program_runs(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    text = (Path(__file__).resolve().parents[2] / "docs" / "reports.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    steps = itertools.count()

    def train_one_epoch(model, loader, controller):
        train(model, loss, controller, [next(steps) for _ in loader])

    scope = {"model": network(), "loader": range(3), "epochs": 4, "example_input": torch.zeros(1, 3, 5, 5)}
    exec(
        compile(block, "reports.md", "exec"),
        {**scope, "feather_param": feather_param, "train_one_epoch": train_one_epoch},
    )
    assert Path("report.png").read_bytes().startswith(b"\x89PNG")
    assert "from step 9 to 12" in " ".join(checked(Path("report.html").read_text(encoding="utf-8")).text)
    assert list(Path("runs/first").iterdir())
    for name in re.findall(r"scalars\.(log_\w+)", text):
        assert callable(getattr(scalars, name))

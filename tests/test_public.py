"""The package imports torch when the first public name is used, and its modules can be imported in any order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import feather_param

ROOT = Path(__file__).parent.parent


def python(code: str, *folders: Path) -> str:
    """Run code in a new process, and return what it prints and the last line of its traceback."""
    path = os.pathsep.join(map(str, (*folders, ROOT)))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + "".join(done.stderr.splitlines()[-1:])


def test_the_package_alone_imports_no_torch():
    code = "import sys, feather_param, feather_param.utils.signals, feather_param.__main__\n"
    assert python(code + "print(feather_param.__version__, 'torch' in sys.modules)") == "0.1.0 False\n"


@pytest.mark.parametrize("code", ["import feather_param; feather_param.sparsify", "from feather_param import plan"])
@pytest.mark.parametrize(
    ("torch", "expected"),
    [
        ("raise ModuleNotFoundError('no torch here')", "ModuleNotFoundError: no torch here"),
        ("raise OSError('libcudart.so')", "OSError: libcudart.so"),
        ("", "ImportError: cannot import name 'Tensor' from 'torch'"),
    ],
    ids=["missing", "broken", "shadowed"],
)
def test_an_error_of_the_import_of_torch_is_shown(code, torch, expected, tmp_path):
    (tmp_path / "torch.py").write_text(torch, encoding="utf-8")
    assert python(code, tmp_path).startswith(expected)


def test_an_attribute_error_of_an_import_is_not_taken_for_a_missing_name(tmp_path):
    (tmp_path / "torch.py").write_text("raise AttributeError('module numpy has no attribute x')", encoding="utf-8")
    said = python("from feather_param import plan", tmp_path)
    assert said == "ImportError: cannot import feather_param: module numpy has no attribute x"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'feather_param' has no attribute 'nonsense'"):
        _ = feather_param.nonsense  # type: ignore[attr-defined]


def test_a_module_can_be_imported_first():
    code = "import feather_param.cli.main; from feather_param import *; print(sparsify.__name__)"
    assert python(code) == "sparsify\n"


def test_threads_can_import_at_the_same_time():
    code = """
import importlib, threading
import feather_param
start, failed = threading.Barrier(6), []
def work(get):
    start.wait()
    try:
        get()
    except BaseException as error:
        failed.append(repr(error))
calls = [lambda: feather_param.sparsify, lambda: feather_param.patterns, lambda: dir(feather_param)]
for name in ("api", "core.config", "reports"):
    calls.append(lambda name=name: importlib.import_module(f"feather_param.{name}"))
threads = [threading.Thread(target=work, args=(call,)) for call in calls]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(failed)
"""
    assert python(code) == "[]\n"

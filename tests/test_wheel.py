"""Build the wheel, and use it outside the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

SCRIPT = """
import pathlib, sys
import torch, feather_param
assert pathlib.Path(feather_param.__file__).is_relative_to(sys.prefix), feather_param.__file__
for extra in ("torchvision", "sklearn", "matplotlib", "tensorboard", "archs", "examples"):
    assert extra not in sys.modules, extra
model = torch.nn.Linear(10, 10)
controller = feather_param.sparsify(model, final_rate=0.8, total_steps=2)
controller.step()
controller.step()
feather_param.desparsify(model)
assert int((model.weight == 0).sum()) == 80
"""


def run(*command: object, cwd: Path) -> None:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_has_the_library_alone_and_works(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "feather_param", source / "feather_param")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"feather_param", "feather_param-0.1.0.dist-info"}
    assert "feather_param/py.typed" in names
    # An environment that uses the torch of this one, but not its editable install.
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    here = next(path for path in sys.path if path.endswith("site-packages"))
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (packages / "borrowed.pth").write_text(here + "\n", encoding="utf-8")
    run(python, "-W", "error", "-c", SCRIPT, cwd=tmp_path)

"""Each command that writes a file, with each fault of the disk: one sentence, the old file, and nothing else."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import feather_param
from feather_param.cli import main as cli
from tests.cli.commands import KINDS, fails

COMMANDS = {
    **{
        f"expand to {suffix}": ["expand", "sparse", f"out{suffix}"]
        for suffix in (".pt", ".pth", ".bin", ".safetensors")
    },
    **{f"bake to {suffix}": ["bake", "training.pt", f"out{suffix}"] for suffix in (".pt", ".safetensors")},
    "compress": ["compress", "in.pt", "out.st"],
    "compress --zstd": ["compress", "--zstd", "in.pt", "out.st"],
    "report --html": ["report", "in.pt", "--no-sizes", "--html", "out.html"],
}
OLD = b"old"


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """Limit the size of the files that the process writes. Python ignores the signal of the limit."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def failing(module: object, name: str, number: int) -> Iterator[None]:
    """Let a function of a module fail."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, fail)
        yield


FAULTS = {
    "full at open": (errno.ENOSPC, lambda: failing(io, "FileIO", errno.ENOSPC)),
    "refused at open": (errno.EACCES, lambda: failing(io, "FileIO", errno.EACCES)),
    "full in the middle": (errno.EFBIG, lambda: limited_files(600)),
    "broken at fsync": (errno.EIO, lambda: failing(os, "fsync", errno.EIO)),
    "refused at the permissions": (errno.EPERM, lambda: failing(shutil, "copymode", errno.EPERM)),
    "read-only at the rename": (errno.EROFS, lambda: failing(os, "replace", errno.EROFS)),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    KINDS["torch"](folder / "in.pt")
    KINDS["sparse"](folder / "sparse")
    layer = nn.Linear(40, 40)
    feather_param.sparsify(layer, final_rate=0.5, total_steps=1, end_step=0)
    torch.save(layer.state_dict(), folder / "training.pt")
    return folder


@pytest.fixture(autouse=True)
def _in_a_folder_with_inputs(inputs, tmp_path, monkeypatch):
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(cli, "page", lambda *_, **__: "page" * 1000)  # it takes long to draw


@pytest.mark.parametrize(
    ("fault", "old"),
    # A new file does not get the permissions of an old one.
    [(fault, old) for fault in FAULTS for old in (False, True) if old or "permissions" not in fault],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_fault_ends_with_one_sentence_and_leaves_the_old_file(command, fault, old, run):
    argv, (number, broken) = COMMANDS[command], FAULTS[fault]
    out = Path(argv[-1])
    if old:
        out.write_bytes(OLD)
    before = sorted(Path().iterdir())
    with broken():
        result = run(*argv)
    fails(result, 1, f"feather-param: error: {out}: {os.strerror(number)}\n")
    assert sorted(Path().iterdir()) == before
    assert not old or out.read_bytes() == OLD
    assert run(*argv).status == 0  # it was the fault alone
    assert out.stat().st_size > 600


def test_a_folder_that_may_not_be_written_to_is_wrong_usage(run):
    Path("folder").mkdir(mode=0o500)
    if os.access("folder", os.W_OK):
        pytest.skip("an administrator may write anywhere, as anyone on Windows")
    for *argv, out in COMMANDS.values():
        fails(run(*argv, f"folder/{out}"), 2, f"expected OUT in a folder that you may write to, got folder/{out}\n")


def test_report_needs_no_temporary_folder(run):
    with failing(os, "open", errno.EROFS), failing(os, "mkdir", errno.EROFS):
        assert "sparse" in run("report", "in.pt").out


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that can be opened and not read")
@pytest.mark.parametrize("command", [["report"], ["bake"], ["compress"], ["expand"]], ids=" ".join)
def test_a_file_that_cannot_be_read_is_named(command, run):
    out = [] if command == ["report"] else ["out.st" if command == ["compress"] else "out.pt"]
    fails(run(*command, "/proc/self/mem", *out), 1, "feather-param: error: /proc/self/mem: Input/output error\n")

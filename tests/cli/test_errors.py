"""A command that fails prints one sentence, and has the documented exit status."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import feather_param
from feather_param.cli import main as cli
from feather_param.files import checkpoint
from feather_param.utils.signals import Signalled
from tests.cli.commands import BENCH, KINDS, fails, process


class Evil:
    def __reduce__(self):
        return (os.system, ("touch hacked",))


def test_nothing_in_a_file_is_run(run):
    for name, content in (("evil.pt", {"w": torch.ones(2), "e": Evil()}), ("whole.pt", nn.Linear(2, 2))):
        for zipped in (True, False):
            torch.save(content, name, _use_new_zipfile_serialization=zipped)
            for command in (["report", name], ["compress", name, "out.safetensors"], ["expand", name, "out.pt"]):
                what = "system" if name == "evil.pt" else "torch.nn.modules.linear.Linear"
                fails(run(*command), 1, what)
                fails(run(*command), 1, "loading these can run any code, so it was not done")
    assert sorted(path.name for path in Path().iterdir()) == ["evil.pt", "whole.pt"]


@pytest.mark.filterwarnings("ignore:.*(TorchScript|torch.jit).*")
def test_other_files_are_told(run):
    torch.jit.script(nn.Linear(2, 2)).save("script.pt")
    torch.save([1, 2], "list.pt")
    torch.save(torch.ones(2), "tensor.pt")
    torch.save({"lr": 0.1}, "numbers.pt")
    torch.save({"weight": torch.zeros(1).expand(2**30, 2**30)}, "huge.pt")
    for name, content in {
        "text": b"hello",
        "empty": b"",
        "json": b'{"weight_map": {}}',
        "zip": b"PK\x03\x04...",
    }.items():
        Path(name).write_bytes(content)
    Path("short").write_bytes(b"\xff\0\0\0\0\0\0\0{")
    for name, message in {
        "script.pt": "got a TorchScript program",
        "list.pt": "expected a state_dict at the top of list.pt, got list; it holds none",
        "tensor.pt": "expected a state_dict at the top of tensor.pt, got tensor; it holds none",
        "numbers.pt": "expected a state_dict at the top of numbers.pt, got dict; it holds none",
        "text": "expected text to be a file of torch, safetensors or save_sparse, got one of another kind",
        "empty": "got an empty one",
        "json": "if it is an index of several files, each of these is a checkpoint",
        "zip": "which is damaged or something else: PytorchStreamReader failed reading zip archive: ",
        "huge.pt": "2048 for each byte of the file, got 4611686018427387904 with weight; save contiguous tensors",
        "short": "expected a safetensors file, got short, which is damaged",
        "missing": "missing: No such file or directory",
        ".": ".: Is a directory",
    }.items():
        fails(run("report", name), 1, message)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_end_with_one_sentence(kind, run):
    KINDS[kind](Path("whole"))
    content = Path("whole").read_bytes()
    generator = random.Random(0)
    failed = 0
    for _ in range(40):
        damaged = bytearray(content)
        if generator.random() < 0.4:
            damaged = damaged[: generator.randrange(len(damaged))]
        else:
            for _ in range(generator.choice([1, 10, 100])):
                damaged[int(len(damaged) * generator.random() ** 2)] = generator.randrange(256)
        Path("damaged").write_bytes(damaged)
        result = run("report", "damaged", "--no-sizes")
        assert result.status in (0, 1), result.err
        assert (result.status == 0) == (result.out != "")
        assert all(line.startswith("feather-param: ") for line in result.err.splitlines()), result.err
        failed += result.status
    assert failed >= 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND; see feather-param --help"),
        (["shrink", "in.pt"], "invalid choice: 'shrink'"),
        (["report"], "the following arguments are required: FILE; see feather-param report --help"),
        (["report", "in.pt", "--csv"], "unrecognized arguments: --csv"),
        (["report", "in.pt", "--html", "in.pt"], "expected two files, got in.pt twice: it would be overwritten"),
        (["report", "in.pt", "--html", "."], "expected OUT to be a file, got the folder ."),
        (["compress", "in.pt", "pipe"], "expected OUT to be a file, got pipe, a device or pipe"),
        (["compress", "in.pt"], "the following arguments are required: OUT"),
        (["compress", "in.pt", "in.pt"], "expected two files, got in.pt twice"),
        (["compress", "in.pt", "link.safetensors"], "expected two files, got link.safetensors twice"),
        (["compress", "in.pt", "hard.safetensors"], "expected two files, got hard.safetensors twice"),
        (
            ["compress", "in.pt", "out.pt"],
            "expected OUT not to end in .pt, got out.pt; a sparse file is a safetensors file: call it out.s",
        ),
        (["compress", "in.pt", "nowhere/out.safetensors"], "expected OUT in an existing folder, got nowhere/out"),
        (["compress", "in.pt", "nowhere.safetensors"], "expected OUT in an existing folder, got nowhere.safetensors"),
        (["expand", "in.pt", "out.onnx"], "expected OUT to end in .pt, .pth, .bin or .safetensors, got out.onnx"),
        (["expand", "sparse.safetensors", "sparse.safetensors"], "expected two files"),
        (["bench", "in.pt", "--input", "1x50"], "the following arguments are required: --arch"),
        (
            ["bench", "in.pt", *BENCH, "--input", "1,50"],
            "argument --input: expected sizes of 1 or more like 1x3x224x224, got 1,50",
        ),
        (["bench", "in.pt", *BENCH, "--input", "0x50"], "expected sizes of 1 or more like 1x3x224x224, got 0x50"),
        (["bench", "in.pt", "--arch", "resnet", "--input", "1"], "expected package.module:function, got resnet"),
        (
            ["bench", "in.pt", "--arch", "nowhere:x", "--input", "1"],
            "nowhere:x to be importable from here, got: No module",
        ),
        (["bench", "in.pt", "--arch", "torch.nn:x", "--input", "1"], "has no attribute 'x'"),
        (["bench", "in.pt", "--arch", "torch.nn:Linear", "5", "--input", "1"], "as name=value, got 5"),
        (["bench", "in.pt", "--arch", "torch:tensor", "data=1", "--input", "1"], "return an nn.Module, got Tensor"),
        (["bench", "in.pt", *BENCH, "colour=red", "--input", "1"], "unexpected keyword argument 'colour'"),
    ],
)
def test_wrong_usage_ends_with_2_and_one_sentence(argv, message, run):
    KINDS["torch"](Path("in.pt"))
    KINDS["sparse"](Path("sparse.safetensors"))
    Path("link.safetensors").symlink_to("in.pt")
    os.link("in.pt", "hard.safetensors")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    Path("nowhere.safetensors").symlink_to(Path("nowhere", "out"))
    os.mkfifo("pipe")
    fails(run(*argv), 2, message)
    Path("pipe").unlink()
    Path("nowhere.safetensors").unlink()
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_a_folder_that_may_not_be_written_to_is_named(run, monkeypatch):
    KINDS["torch"](Path("in.pt"))
    monkeypatch.setattr(cli.os, "access", lambda path, mode: False)  # an administrator may write anywhere
    fails(run("compress", "in.pt", "out"), 2, "expected OUT in a folder that you may write to, got out")


def test_a_page_without_matplotlib_fails_before_any_work(run, monkeypatch):
    KINDS["torch"](Path("in.pt"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(cli, "read", None)
    fails(run("report", "in.pt", "--html", "page.html"), 1, "pip install 'feather_param[plot]'")
    assert not Path("page.html").exists()


@pytest.mark.parametrize(
    "command",
    [["compress", "in.pt", "out.safetensors"], ["expand", "sparse", "out.pt"], ["bake", "training.pt", "out.pt"]],
)
def test_a_stopped_command_leaves_the_old_file_and_no_other(command, run, monkeypatch):
    KINDS["torch"](Path("in.pt"))
    KINDS["sparse"](Path("sparse"))
    layer = nn.Linear(4, 4)
    feather_param.sparsify(layer, final_rate=0.5, total_steps=1, end_step=0)
    torch.save(layer.state_dict(), "training.pt")
    Path(command[2]).write_bytes(b"old")

    def stop(*_: object) -> None:
        assert len(list(Path().iterdir())) == 5  # the new file is there, under another name
        raise Signalled(signal.SIGINT)

    monkeypatch.setattr(os, "fsync", stop)
    fails(run(*command), 130, "interrupted")
    assert sorted(path.name for path in Path().iterdir()) == sorted(["in.pt", "sparse", "training.pt", command[2]])
    assert Path(command[2]).read_bytes() == b"old"


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_ends_a_process_with_130(tmp_path):
    (tmp_path / "waits.py").write_text("print('ready', flush=True)\nwhile True: pass\n", encoding="utf-8")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child would go on ignoring it
    try:
        running = process("bench", "in.pt", "--arch", "waits:waits", "--input", "1", cwd=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out, err) == (130, "", "feather-param: error: interrupted\n")


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
@pytest.mark.parametrize("command", [["report", "pipe"], ["compress", "pipe", "out.st"], ["bake", "pipe", "out.pt"]])
def test_a_pipe_is_not_waited_for(command, run):
    os.mkfifo("pipe")
    fails(run(*command), 1, "expected pipe to be a file, got a device or pipe; write its content to a file")


NO_MEMORY = {
    "torch": (torch, "load", RuntimeError("[enforce fail at x.cpp:1] err == 0. DefaultCPUAllocator: can't allocate")),
    "state_dict": (torch, "load", MemoryError("Unable to allocate 2.10 MiB")),
    "safetensors": (checkpoint, "load_file", SafetensorError("Cannot allocate memory (os error 12)")),
    "sparse": (checkpoint, "open_container", SafetensorError("Cannot allocate memory (os error 12)")),
}


@pytest.mark.parametrize("kind", NO_MEMORY)
def test_too_little_memory_is_no_damage(kind, run, monkeypatch):
    KINDS[kind](Path("in"))
    module, name, error = NO_MEMORY[kind]

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(module, name, fail)
    fails(run("report", "in"), 1, "error: out of memory\n")


@pytest.mark.parametrize("command", [["report", "in"], ["compress", "--zstd", "in", "out.st"]])
def test_too_little_memory_for_zstandard(command, run, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    KINDS["state_dict" if command[0] == "report" else "torch"](Path("in"))

    class Compressor:
        def __init__(self, level: int) -> None:
            raise zstandard.ZstdError("cannot compress: Allocation error : not enough memory")

    monkeypatch.setattr(zstandard, "ZstdCompressor", Compressor)
    fails(run(*command), 1, "error: out of memory\n")
    assert not Path("out.st").exists()


@pytest.mark.parametrize("command", [["report", "in"], ["compress", "in", "out.st"]])
def test_two_tensors_of_one_name_are_refused(command, run):
    torch.save({1: torch.ones(2, 2), "1": torch.zeros(2, 2)}, "in")
    fails(run(*command), 1, "expected a name for each tensor of in, got 1 twice; rename one")


def test_safetensors_holds_no_tensor_with_the_name_of_its_metadata(run):
    feather_param.save_sparse({"__metadata__": torch.ones(2, 2)}, "in")
    fails(run("expand", "in", "out.safetensors"), 1, "cannot hold a tensor named __metadata__; expand to a .pt file")
    assert run("expand", "in", "out.pt").status == 0


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_reader_that_leaves_is_no_error():
    KINDS["torch"](Path("in.pt"))
    reading, writing = os.pipe()
    os.close(reading)
    running = process("report", "in.pt", stdout=writing)
    _, err = running.communicate(timeout=60)
    os.close(writing)
    assert (running.returncode, err) == (141, "")

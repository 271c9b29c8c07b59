"""The command line: what it prints and writes, and what it says of files and arguments that are wrong."""

from __future__ import annotations

import gzip
import importlib.metadata
import io
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

import feather_param
from feather_param.cli import main as cli
from feather_param.files import safetensors as container
from feather_param.files import sizes
from tests.reports.test_reports import checked

ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")


def state() -> dict[str, torch.Tensor]:
    """90 % zeros in one weight, half in the other, none in a third; a tied one, and others."""
    generator = torch.Generator().manual_seed(0)

    def pruned(rate: float, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        values = 1 + torch.rand(shape, generator=generator)
        return torch.where(torch.rand(shape, generator=generator) < rate, 0.0, values).to(dtype)

    weight = pruned(0.9, 40, 50)
    others = {"norm.weight": torch.zeros(16), "norm.count": torch.tensor(7), "empty": torch.zeros(0, 4)}
    dense = {"half.weight": pruned(0.5, 8, 3, 3, 3, dtype=torch.bfloat16), "dense.weight": pruned(0.0, 4, 4)}
    return {"fc.weight": weight, "tied.weight": weight, **dense, **others}


TENSORS = state()
ZEROS = {name: int((TENSORS[name] == 0).sum()) for name in ("fc.weight", "half.weight", "dense.weight", "empty")}

KINDS: dict[str, Callable[[Path], None]] = {
    "torch": lambda path: torch.save(TENSORS, path),
    "legacy": lambda path: torch.save(TENSORS, path, _use_new_zipfile_serialization=False),
    "state_dict": lambda path: torch.save({"state_dict": TENSORS, "epoch": 3}, path),
    "model": lambda path: torch.save({"rng": torch.zeros(3), "model": TENSORS}, path),
    "model_state_dict": lambda path: torch.save({"model_state_dict": TENSORS}, path),
    "safetensors": lambda path: safetensors.torch.save_file({k: v.clone() for k, v in TENSORS.items()}, path),
    "sparse": lambda path: feather_param.save_sparse(TENSORS, path),
    "sparse zstd": lambda path: feather_param.save_sparse(TENSORS, path, zstd=True),
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(name="run")
def _run(capsys):
    def run(*argv: object) -> SimpleNamespace:
        status = cli.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run


def done(result: SimpleNamespace) -> str:
    assert (result.status, result.err) == (0, "")
    return result.out


def fails(result: SimpleNamespace, status: int, message: str) -> None:
    assert result.out == ""
    assert result.err.startswith("feather-param: error: ")
    assert result.err.count("\n") == 1, result.err
    assert message in result.err
    assert result.status == status


def process(*argv: object, **options) -> subprocess.Popen[str]:
    """Start the command as a user would; its own line of imports apart, this is what the entry point runs."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "feather_param", *map(str, argv)]
    return subprocess.Popen(
        command, env=env, text=True, stderr=subprocess.PIPE, **{"stdout": subprocess.PIPE, **options}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_report_knows_every_kind_of_file_by_its_content(kind, run):
    KINDS[kind](Path("file"))
    report = json.loads(done(run("report", "file", "--json")))
    tensors = {tensor["name"]: tensor for tensor in report["tensors"]}
    assert {name: tensor["shape"] for name, tensor in tensors.items()} == {k: list(v.shape) for k, v in TENSORS.items()}
    assert tensors["half.weight"]["dtype"] == "bfloat16"
    zeros = {name: tensor["zeros"] for name, tensor in tensors.items() if tensor["zeros"] is not None}
    tied = {} if kind != "safetensors" else {"tied.weight": ZEROS["fc.weight"]}  # the format knows no ties
    assert zeros == {**ZEROS, **tied}
    assert report["zeros"] == sum(zeros.values())
    assert report["total"] == sum(TENSORS[name].numel() for name in zeros)
    assert report["kind"] == kind.split()[0] if kind.startswith("s") and kind != "state_dict" else "torch"
    assert report["bytes"] == Path("file").stat().st_size
    assert report["key"] == (kind if kind in ("state_dict", "model", "model_state_dict") else "")
    assert report["beside"] == {"state_dict": ["epoch"], "model": ["rng"]}.get(kind, [])
    text = done(run("report", "file", "--no-sizes"))
    assert f"{report['zeros']:,}" in text
    assert ("tied to one of these" in text) == (kind != "safetensors")


def test_sizes_are_those_of_the_files(run):
    KINDS["torch"](Path("file"))
    found = json.loads(done(run("report", "file", "--json")))["sizes"]
    once = [TENSORS[name] for name in TENSORS if name != "tied.weight"]
    raw = b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in once if tensor.numel())
    feather_param.save_sparse(TENSORS, "sparse")
    feather_param.save_sparse(TENSORS, "zstd", zstd=True)
    assert found == {
        "dense": len(raw),
        "dense_gzip": len(gzip.compress(raw, 6)),
        "sparse": Path("sparse").stat().st_size,
        "sparse_zstd": Path("zstd").stat().st_size,
    }
    assert json.loads(done(run("report", "file", "--json", "--no-sizes")))["sizes"] == {}


def test_sizes_without_zstandard_leave_it_out(run, monkeypatch):
    KINDS["torch"](Path("file"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert list(json.loads(done(run("report", "file", "--json")))["sizes"]) == ["dense", "dense_gzip", "sparse"]
    fails(run("compress", "--zstd", "file", "out.safetensors"), 1, "pip install 'feather_param[files]'")


def test_report_writes_a_page(run):
    KINDS["sparse"](Path("a <b> & c"))
    assert "fc.weight" in done(run("report", "a <b> & c", "--html", "page.html"))
    found = checked(Path("page.html").read_text(encoding="utf-8"))
    assert found.text.count("a <b> & c") == 2  # title and headline
    assert "fc.weight" in found.text
    assert "sparse + zstd" in found.text
    assert sorted(path.name for path in Path().iterdir()) == ["a <b> & c", "page.html"]


def test_report_of_eight_bit_floats(run):
    torch.save({"w": torch.tensor([[0.0, 1.0, 2.0]]).to(torch.float8_e4m3fn)}, "file")
    assert json.loads(done(run("report", "file", "--json")))["zeros"] == 1


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="torch has no four-bit floats")
def test_report_of_four_bit_floats_does_not_count_them(run):
    packed = torch.zeros(4, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    torch.save({"packed": packed, "w": torch.zeros(2, 3)}, "file")
    report = json.loads(done(run("report", "file", "--json")))
    assert (report["total"], [tensor["zeros"] for tensor in report["tensors"]]) == (6, [None, 6])


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_report_of_nested_tensors_does_not_count_them(run):
    torch.save({"n": torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)]), "w": torch.eye(2)}, "file")
    report = json.loads(run("report", "file", "--json").out)
    assert (report["total"], report["others"]) == (4, {"n": "nested tensor"})


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    same = all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))
    return list(a) == list(b) and same


@pytest.mark.parametrize("zstd", [[], ["--zstd"]], ids=["plain", "zstd"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_compressed_and_expanded_is_the_same(suffix, zstd, run):
    KINDS["torch"](Path("in.pt"))
    before = Path("in.pt").read_bytes()
    printed = done(run("compress", "in.pt", "small.safetensors", *zstd))
    assert f"small.safetensors: {Path('small.safetensors').stat().st_size:,} bytes" in printed
    out = Path(f"out{suffix}")
    done(run("expand", "small.safetensors", out))
    if suffix == ".safetensors":
        found = safetensors.torch.load_file(out)
        with safetensors.safe_open(out, "pt") as file:
            assert file.metadata() == {"format": "pt"}  # transformers asks for it
    else:
        found = torch.load(out, weights_only=True)
        assert found["fc.weight"].data_ptr() == found["tied.weight"].data_ptr()
        assert found["dense.weight"].untyped_storage().nbytes() == 64  # no tensor brings the others along
    assert identical({name: found[name] for name in TENSORS}, TENSORS)
    assert Path("in.pt").read_bytes() == before
    assert sorted(path.name for path in Path().iterdir()) == sorted(["in.pt", out.name, "small.safetensors"])


@pytest.mark.parametrize("kind", ["legacy", "model_state_dict", "safetensors"])
def test_compress_takes_what_holds_nothing_but_tensors(kind, run):
    KINDS[kind](Path("in"))
    done(run("compress", "in", "out.safetensors"))
    found = feather_param.load_sparse("out.safetensors")
    assert identical({name: found[name] for name in TENSORS}, TENSORS)


def test_compress_drops_nothing_that_it_was_not_told_to(run):
    torch.save({"model": TENSORS, "optimizer": {"state": {}}, "epoch": 3}, "run.pt")
    fails(
        run("compress", "run.pt", "out.safetensors"),
        1,
        "run.pt also holds optimizer, epoch, which a sparse file cannot; to keep the weights alone, say so: --key",
    )
    done(run("compress", "run.pt", "out.safetensors", "--key", "model"))
    torch.save({**TENSORS, "epoch": 3}, "mixed.pt")
    fails(run("compress", "mixed.pt", "no.safetensors"), 1, "expected tensors alone, got int at epoch")
    torch.save({**TENSORS, "s": torch.eye(3).to_sparse()}, "layout.pt")
    fails(run("compress", "layout.pt", "no.safetensors"), 1, "expected tensors alone, got sparse_coo tensor at s")
    assert not Path("no.safetensors").exists()


def test_key_goes_down_into_a_file(run):
    torch.save({"a": {"b.c": {"d": TENSORS}, "e": 1}, "f": [1]}, "deep.pt")
    fails(run("report", "deep.pt"), 1, "got dict; choose one of these with --key: a.b.c.d (7 tensors)")
    report = json.loads(done(run("report", "deep.pt", "--json", "--key", "a.b.c.d")))
    assert (report["key"], report["beside"], report["zeros"]) == ("a.b.c.d", ["f", "a.e"], sum(ZEROS.values()))
    fails(run("report", "deep.pt", "--key", "a.x"), 1, "expected x in deep.pt, got b.c, e")
    fails(run("report", "deep.pt", "--key", "a"), 1, "expected a state_dict at a of deep.pt, got dict")
    fails(run("report", "deep.pt", "--key", "f"), 1, "expected a state_dict at f of deep.pt, got list")
    KINDS["sparse"](Path("sparse"))
    fails(run("report", "sparse", "--key", "a"), 1, "expected no key for sparse")


def test_notes_are_on_stderr_and_in_the_json(run):
    mask = torch.tensor([[0.0, 0.0, 1.0]])
    torch.save({"w": torch.tensor([[-1.0, 1.0, -2.0]]) * mask, "n": 3, "s": torch.eye(3).to_sparse()}, "file")
    result = run("report", "file", "--json")
    assert result.status == 0
    report = json.loads(result.out)
    assert report["zeros"] == 2
    assert report["others"] == {"n": "int", "s": "sparse_coo tensor"}
    assert result.err.splitlines() == [f"feather-param: note: {note}" for note in report["notes"]]
    assert "no dense tensors: n (int), s (sparse_coo tensor)" in report["notes"][0]
    assert report["notes"][1].startswith("1 zeros are -0.0")


def test_a_model_in_training_has_its_zeros_not_yet(run):
    model = nn.Linear(8, 8)
    feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0)
    torch.save(model.state_dict(), "training.pt")
    result = run("report", "training.pt", "--no-sizes")
    assert result.status == 0
    assert "its zeros are not in them yet; save feather_param.baked_state_dict(model)" in result.err
    torch.save(feather_param.baked_state_dict(model), "baked.pt")
    assert "64     32  50.000%" in done(run("report", "baked.pt", "--no-sizes"))
    bench = ["--arch", "torch.nn:Linear", "in_features=8", "out_features=8", "--input", "1x8"]
    fails(run("bench", "training.pt", *bench), 1, "its zeros are not in them yet")


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
        "huge.pt": "out of memory",
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


BENCH = ["--arch", "torch.nn:Linear", "in_features=50", "out_features=40", "bias=False"]


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
        (["compress", "in.pt", "out.pt"], "it becomes, got out.pt; call it out.safetensors"),
        (["compress", "in.pt", "nowhere/out.safetensors"], "expected OUT in a folder that is there, got nowhere/out"),
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
    os.mkfifo("pipe")
    fails(run(*argv), 2, message)
    Path("pipe").unlink()
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_a_folder_that_may_not_be_written_to_is_named(run, monkeypatch):
    KINDS["torch"](Path("in.pt"))
    monkeypatch.setattr(cli.os, "access", lambda path, mode: False)  # an administrator may write anywhere
    fails(run("compress", "in.pt", "out"), 2, "expected OUT in a folder that you may write to, got out")


def test_what_needs_no_doing_is_told(run):
    KINDS["torch"](Path("in.pt"))
    KINDS["sparse"](Path("sparse.safetensors"))
    fails(run("compress", "sparse.safetensors", "out.safetensors"), 1, "is a sparse file already")
    fails(run("expand", "in.pt", "out.pt"), 1, "in.pt is no sparse file: its tensors are dense already")
    feather_param.save_sparse({"w": torch.zeros(3, dtype=torch.complex128)}, "complex")
    fails(
        run("expand", "complex", "out.safetensors"), 1, "safetensors cannot hold torch.complex128; expand to a .pt file"
    )
    done(run("expand", "complex", "out.pt"))


@pytest.mark.parametrize("command", [["compress", "in.pt", "out.safetensors"], ["expand", "sparse", "out.pt"]])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device", "out")])
def test_a_stopped_command_leaves_the_old_file_and_no_other(command, error, run, monkeypatch):
    KINDS["torch"](Path("in.pt"))
    KINDS["sparse"](Path("sparse"))
    Path(command[2]).write_bytes(b"old")

    def stop(*_: object) -> None:
        assert len(list(Path().iterdir())) == 4  # the new file is there, under another name
        raise error

    monkeypatch.setattr(container.os, "fsync", stop)
    if error is KeyboardInterrupt:
        fails(run(*command), 130, "interrupted")
    else:
        fails(run(*command), 1, "out: No space left on device")
    assert sorted(path.name for path in Path().iterdir()) == sorted(["in.pt", "sparse", command[2]])
    assert Path(command[2]).read_bytes() == b"old"


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals and pipes")
def test_ctrl_c_ends_a_process_with_130(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child would go on ignoring it
    try:
        running = process("report", tmp_path / "pipe")
    finally:
        signal.signal(signal.SIGINT, before)
    writing, deadline = None, time.monotonic() + 120
    while writing is None and running.poll() is None and time.monotonic() < deadline:
        try:
            writing = os.open(tmp_path / "pipe", os.O_WRONLY | os.O_NONBLOCK)  # fails until the command reads
        except OSError:
            time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out, err) == (130, "", "feather-param: error: interrupted\n")
    assert writing is not None
    os.close(writing)


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_reader_that_leaves_is_no_error():
    KINDS["torch"](Path("in.pt"))
    reading, writing = os.pipe()
    os.close(reading)
    running = process("report", "in.pt", stdout=writing)
    _, err = running.communicate(timeout=60)
    os.close(writing)
    assert (running.returncode, err) == (141, "")


def test_the_command_is_installed():
    installed = importlib.metadata.distributions(name="feather_param")
    scripts = [script for package in installed for script in package.entry_points if script.name == "feather-param"]
    assert [script.load() for script in scripts[:1]] == [cli.main]
    assert cli.main(["--version"]) == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals_alone_and_leaves_nothing(run, monkeypatch, capsys):
    KINDS["torch"](Path("in.pt"))
    monkeypatch.setattr(sizes, "_CHUNK", 64)
    monkeypatch.setattr(cli, "_EVERY", 0.0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(["report", "in.pt"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    lines = terminal.getvalue().split("\r\x1b[K")
    assert lines[-1] == ""
    assert {"reading ...", "gzip 100%", "sparse ...", "sparse + zstd ..."} <= set(lines)


def test_bench_times_the_network(run):
    weight = torch.where(torch.rand(40, 50) < 0.9, 0.0, torch.randn(40, 50))
    torch.save({"module.weight": weight}, "in.pt")  # as DDP names it
    rows = json.loads(done(run("bench", "in.pt", *BENCH, "--input", "2x50", "--json")))["rows"]
    assert [(row["shape"], row["rate"]) for row in rows] == [
        ([40, 50], pytest.approx(float((weight == 0).sum()) / 2000))
    ]
    assert rows[0]["dense_ms"] > 0
    fails(run("bench", "in.pt", *BENCH, "--input", "2x51"), 1, "with an input of (2, 51)")
    fails(
        run("bench", "in.pt", *BENCH[:3], "out_features=3", "--input", "2x50"),
        1,
        "expected the weights of this network",
    )


# The documentation


def masked(text: str) -> str:
    """Without numbers that depend on the versions of torch, zlib and zstandard, and the blanks around them."""
    return re.sub(r" +", " ", re.sub(r"[\d,.]+( bytes|%)", r"N\1", text))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


def test_the_documented_session_runs_as_shown(run):
    (code,) = blocks("python")
    exec(compile(code, "command-line.md", "exec"), {})
    shown = 0
    for session in blocks("console"):
        for part in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            program, *argv = shlex.split(command)
            assert program == "feather-param"
            assert masked(done(run(*argv))) == masked(expected), command
            shown += 1
    assert shown >= 4


def test_every_option_is_documented(run):
    helps = [done(run(*command, "--help")) for command in ([], ["report"], ["compress"], ["expand"], ["bench"])]
    options = {option for text in helps for option in re.findall(r"--[a-z][a-z-]+", text)} - {"--help"}
    assert options == set(re.findall(r"--[a-z][a-z-]+", DOCS))
    for status in ("0 done", "1 a file cannot be processed", "2 wrong usage", "130 interrupted", "141 nobody reads"):
        assert status in helps[0]
        assert re.search(rf"\| {status.split()[0]} \|", DOCS), status

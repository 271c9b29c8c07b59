"""Torch and safetensors files that would take much memory or time, or end the process: one sentence instead."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from feather_param.files.torch_pickle import check
from tests.cli.commands import ROOT, done, fails
from tests.cli.hostile import integer, named, text

LAUGHS = b"K\x00" + b"q\x01h\x01\x86" * 60  # a tuple of 2**60 items, by shared references
ORDERED = named("collections OrderedDict") + b")R"


def ints(*numbers: int) -> bytes:
    return b"(" + b"".join(map(integer, numbers)) + b"t"


def tensor(shape: tuple[int, ...] = (2, 2), strides: tuple[int, ...] = (2, 1), numel: int = 4) -> bytes:
    """Return the opcodes of a tensor of float32 in the storage "0"."""
    storage = b"(" + text("storage") + named("torch FloatStorage") + text("0") + text("cpu") + integer(numel) + b"tQ"
    arguments = b"(" + storage + integer(0) + ints(*shape) + ints(*strides) + b"\x89" + ORDERED + b"t"
    return named("torch._utils _rebuild_tensor_v2") + arguments + b"R"


def call(name: str, *arguments: bytes) -> bytes:
    return named(name) + b"(" + b"".join(arguments) + b"tR"


def write(pickled: bytes, weight: bytes = tensor(), deflated: bool = False) -> None:
    """Write a torch file with the storage "0" of 16 bytes and an entry "w", a weight, and further entries."""
    with zipfile.ZipFile("in", "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as file:
        for name, content in {
            "data.pkl": b"\x80\x02}" + text("w") + weight + b"s" + pickled + b".",
            "byteorder": b"little",
            "data/0": struct.pack("<4f", 1, 0, 0, 2),
            "version": b"3\n",
        }.items():
            file.writestr(f"archive/{name}", content)


def entry(value: bytes) -> bytes:
    return text("x") + value + b"s"


def copied(value: bytes) -> bytes:
    """Return the opcodes of a tensor as complex128."""
    return call("torch._utils _rebuild_device_tensor_from_cpu_tensor", value, named("torch complex128"), CPU)


def with_attributes(state: bytes) -> bytes:
    """Return the opcodes of a Parameter with attributes."""
    return call("torch._utils _rebuild_parameter_with_state", tensor(), b"\x89", ORDERED, state)


CPU = text("cpu") + b"\x89"  # and requires_grad=False
EXPANDED = tensor((2**30, 2), (0, 1))
MANY = b"N}(" + b"".join(text(str(i)) + b"N" for i in range(9000)) + b"u\x86"  # (None, {"0": None, ...})
COO = call("torch.serialization _get_layout", text("torch.sparse_coo"))
DOUBLED = call("_codecs encode", text("a" * 9), text("latin1"))
DOUBLED += (b"q\x01" + named("_codecs encode") + b"h\x01" + text("hex") + b"\x86R") * 40

BOMBS = {
    "an expanded tensor": (entry(EXPANDED), "got 8589934608 with x; save contiguous tensors"),
    "bytes": (entry(call("builtins bytearray", integer(2**33))), "a call of bytearray that torch.save does not write"),
    "bytes of Python 2": (entry(call("__builtin__ bytearray", integer(2**33))), "a call of bytearray"),
    "bytes by a tensor": (entry(call("builtins bytearray", tensor((), ()))), "a call of bytearray"),
    "bytes by a module that moved": (entry(call("exceptions bytearray", integer(2**33))), "got exceptions.bytearray"),
    "a legacy tensor": (entry(call("torch FloatTensor", integer(2**33))), "a call of FloatTensor"),
    "a storage": (entry(call("torch.storage UntypedStorage", integer(2**33))), "a call of UntypedStorage"),
    "a nested call": (
        entry(call("torch._tensor _rebuild_from_type_v2", named("builtins bytearray"), b"N", ints(2**33), b"N")),
        "a call of bytearray",
    ),
    "a text that doubles": (entry(DOUBLED), "a call of encode that torch.save does not write"),
    "a copy of an expanded tensor": (entry(copied(EXPANDED)), "expected copies of tensors of at most"),
    "a copy of other elements than at first": (
        entry(copied(named("torch.nn.parameter Parameter") + tensor() + b"\x85\x81(" + EXPANDED + b"N}\x89Ntb")),
        "expected copies of tensors of at most",
    ),
    "a copy of elements that are an attribute": (
        entry(copied(with_attributes(b"}" + text("data") + EXPANDED + b"s"))),
        "expected copies of tensors of at most",
    ),
    "a copy of more bytes": (entry(copied(tensor((2**17, 2), (0, 1)))), "expected copies of tensors of at most"),
    "attributes that are set often": (
        entry(b"](" + MANY + b"q\x01" + with_attributes(b"h\x01") * 300 + b"e"),
        "repeats its values many times",
    ),
    "expanded indices": (
        entry(call("torch._utils _rebuild_sparse_tensor", COO, b"(", EXPANDED, EXPANDED, ints(5), b"t")),
        "expected copies of tensors of at most",
    ),
    "a class that computes with numbers": (
        entry(call("torch.distributed._mesh_layout _FlatLayout", ints(*[2**2000] * 3000))),
        "got torch.distributed._mesh_layout._FlatLayout: loading these can run any code",
    ),
    "a set of an expanded tensor": (entry(call("builtins set", EXPANDED)), "a call of set"),
    "a key with shared parts": (LAUGHS + b"Ns", "a pickle that repeats its values many times"),
    "a set with shared parts": (entry(call("builtins set", b"]", LAUGHS, b"a")), "repeats its values many times"),
    "a key that is nested deeply": (b"N" + b"\x85" * 10**5 + b"Ns", "values that are nested too deeply"),
    "a list that is read often": (
        entry(b"](" + b"K\x00" * 9000 + b"eq\x01" + b"".join([call("builtins set", b"h\x01")] * 2000)),
        "repeats its values many times",
    ),
    "many dimensions": (entry(tensor((1,) * 65, (1,) * 65)), "expected at most 64 dimensions, got 65"),
    "a tensor past its storage": (entry(tensor((2, 3), (3, 1))), "a tensor past the end of its storage"),
}


@pytest.mark.parametrize(("pickled", "message"), BOMBS.values(), ids=BOMBS)
def test_a_pickle_cannot_take_memory_or_time(pickled, message, run):
    write(pickled)
    fails(run("report", "in"), 1, message)


def test_each_command_refuses_such_a_pickle(run):
    pickled, message = BOMBS["an expanded tensor"]
    write(pickled)
    for command in (["compress", "in", "out.st"], ["bake", "in", "out.pt"], ["expand", "in", "out.pt"]):
        fails(run(*command), 1, message)
    assert [path.name for path in Path().iterdir()] == ["in"]


def test_a_pickle_is_no_longer_than_its_file(run):
    write(b"]" * 10**5, deflated=True)
    fails(run("report", "in"), 1, "expected data.pkl of at most")


def test_a_record_of_torchscript_does_not_hide_a_pickle(run):
    """torch finds a record also by a name with other capitals."""
    write(BOMBS["bytes"][0])
    with zipfile.ZipFile("in", "a") as file:
        file.writestr("archive/CONSTANTS.PKL", b"")
    fails(run("report", "in"), 1, BOMBS["bytes"][1])


def test_a_quantised_tensor_is_as_large_as_its_empty_one(run):
    storage = b"(" + text("storage") + named("torch QInt8Storage") + text("0") + text("cpu") + integer(16) + b"tQ"
    scale = named("torch per_tensor_affine") + b"G" + struct.pack(">d", 1) + b"K\x00\x87"
    arguments = (storage, integer(0), ints(2**33), ints(0), scale, b"\x89", ORDERED)
    write(entry(call("torch._utils _rebuild_qtensor", *arguments)), weight=b"N")
    fails(run("report", "in"), 1, "expected copies of tensors of at most")


def test_a_storage_has_the_bytes_that_it_claims(run):
    """torch 2.6 would read other memory of the process."""
    write(b"", weight=tensor((100, 100), (100, 1), numel=10_000))
    fails(run("report", "in"), 1, "a storage of 40000 bytes that takes 16 in the file")


def test_a_storage_may_have_bytes_after_its_last_number():
    """torch 2.6 reads such a file, and newer ones refuse it."""
    torch.save({"w": torch.tensor([]).set_(torch.UntypedStorage(11), 0, (2,))}, "in")  # type: ignore[call-overload]
    check(Path("in"))


def test_many_records_of_the_same_bytes_count_each(run):
    """A directory may list one compressed record under many names."""
    with zipfile.ZipFile("in", "w", zipfile.ZIP_DEFLATED) as file:
        content = b"".join(
            text(str(i)) + tensor((2**20,), (1,), 2**20).replace(text("0"), text(str(i))) + b"s" for i in range(500)
        )
        file.writestr("archive/data.pkl", b"\x80\x02}" + content + b".", zipfile.ZIP_STORED)
        file.writestr("archive/version", b"3\n")
        file.writestr("archive/data/0", bytes(2**22))
        for i in range(1, 500):
            twin = zipfile.ZipInfo(f"archive/data/{i}")
            for field in ("compress_type", "CRC", "compress_size", "file_size", "header_offset", "external_attr"):
                setattr(twin, field, getattr(file.getinfo("archive/data/0"), field))
            file.filelist.append(twin)
    assert Path("in").stat().st_size < 250_000
    fails(run("report", "in"), 1, "expected storages of at most")


VIEWS = {
    "many views": {str(i): torch.arange(1e5)[i : i + 90_000].expand(30, 90_000) for i in range(100)},
    "overlapping rows": {"w": torch.arange(1e5).as_strided((90_000, 10_000), (1, 1))},
}


@pytest.mark.parametrize("state", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_that_share_memory_are_bounded_together(state, zipped, run):
    storage = torch.arange(1e5)
    views = {name: storage.as_strided(view.shape, view.stride(), view.storage_offset()) for name, view in state.items()}
    torch.save(views, "in", _use_new_zipfile_serialization=zipped)
    fails(run("report", "in"), 1, "2048 for each byte of the file, got")
    torch.save({"w": storage, **dict.fromkeys(map(str, range(300)), storage)}, "in")
    assert "300 tied to one of these" in done(run("report", "in", "--no-sizes"))


def test_containers_may_share_and_hold_themselves(run):
    content: dict[str, object] = {"net": {"deep": {"w": torch.ones(2, 2)}}}
    for _ in range(60):
        content = {"a": content, "b": content}
    content["self"] = content
    torch.save(content, "in")
    fails(run("report", "in"), 1, "choose one of these with --key: a.a.a.a.")


def test_attributes_of_loaded_objects_hide_no_methods(run):
    weight = nn.Parameter(torch.eye(2))
    weight.detach = weight.numel = 5  # type: ignore[assignment]
    torch.save({"w": weight}, "in")
    done(run("report", "in"))
    hidden = b"}" + b"".join(text(name) + b"K\x05s" for name in ("values", "items", "get", "keys"))
    write(text("state_dict") + ORDERED + entry(tensor()) + hidden + b"bs", weight=b"N")
    done(run("report", "in"))


def test_keys_that_are_no_texts_have_names(run):
    torch.save({"w": torch.eye(2), torch.ones(3): 1, (1, torch.ones(2)): 2, 3: None, None: 0.5}, "in")
    others = json.loads(run("report", "in", "--json", "--no-sizes").out)["others"]
    assert others == {"Tensor": "int", "tuple": "int", "3": "NoneType", "None": "float"}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel and other:UserWarning")
def test_what_torch_saves_is_read(run):
    """Values of each kind that ``weights_only=True`` accepts, an expanded buffer among them."""
    weight = torch.eye(8)
    ids = torch.arange(512).expand((4, -1))
    optimizer = torch.optim.AdamW([nn.Parameter(weight)])
    optimizer.param_groups[0]["params"][0].grad = weight
    optimizer.step()
    shared = ["a" * 2000, tuple(range(100)), *range(5000)]
    others = {"bytes": bytes(range(256)) * 99, "bytearray": bytearray(9999), "set": set(range(999)), "complex": 1j}
    others |= {"size": weight.shape, "dtype": torch.float64, "nested": [[[(1, 2.0)]] * 9] * 9, "text": "a" * 9999}
    others |= {"coo": weight.to_sparse(), "optimizer": optimizer.state_dict(), 5: None, (1, (2, 3)): True}
    others |= {"sets": [{*shared[:2]} for _ in range(300)]}
    others |= {"packed": torch.quantize_per_channel(weight, torch.ones(8), torch.zeros(8), 0, torch.quint4x2)}
    parameters = [nn.Parameter(weight) for _ in range(200)]
    for parameter in parameters:
        parameter.groups = shared  # type: ignore[attr-defined]
    others["parameters"] = parameters
    for zipped in (True, False):
        torch.save({"w": weight, "ids": ids, **others}, "in", _use_new_zipfile_serialization=zipped)
        report = json.loads(run("report", "in", "--json").out)
        assert [entry["name"] for entry in report["tensors"]] == ["w", "ids"]
        assert len(report["others"]) == len(others)


def test_thousands_of_tensors_and_other_entries_take_a_second(run):
    torch.save({f"{i}.weight": torch.ones(1, 2) for i in range(2_000)} | {f"n{i}": i for i in range(10**4)}, "in")
    result = run("report", "in", "--no-sizes")
    assert (result.status, "4,000" in result.out) == (0, True)


def test_a_shape_of_many_dimensions_in_a_safetensors_file_is_refused(run):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}}).encode()
    Path("in").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    fails(run("report", "in"), 1, "expected at most 64 dimensions, got 65 of w in in; reshape it")


@pytest.mark.filterwarnings("error")
def test_odd_names_in_a_pickle_cause_no_warning(run):
    write(named("torch \\p\xcb"))
    fails(run("report", "in"), 1, "codec can't decode byte 0xc3")


def test_an_error_of_torch_is_shown_in_one_line(run):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}}).encode()
    Path("in").write_bytes(struct.pack("<Q", len(header)) + header)
    fails(run("report", "in"), 1, "expected a safetensors file, got in, which is damaged: ")


@pytest.mark.skipif(sys.platform == "win32", reason="measures memory with the module resource")
def test_random_changes_end_with_one_sentence_and_little_memory():
    """A process of its own, because a fault may end it. `tests.cli.hostile_run` says what is checked."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.cli.hostile_run", "0", "300"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=env, text=True, capture_output=True, timeout=300, check=False)
    assert process.returncode == 0, process.stdout[-20:] + process.stderr[-2000:]
    refused, total = map(int, process.stdout.splitlines()[-1].replace("refused", "").split("of"))
    assert 0.5 < refused / total < 1

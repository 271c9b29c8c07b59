"""Sparse files: bit for bit the same comes back, they are small, and a damaged one is told."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import feather_param
from feather_param import files, load_sparse, save_sparse, schedules

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
OTHERS = [torch.bool, torch.complex64, torch.complex128]


def raw(tensor: torch.Tensor) -> bytes:
    tensor = tensor.contiguous().reshape(-1)
    tensor = torch.view_as_real(tensor).reshape(-1) if tensor.is_complex() else tensor
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape, raw(a)) == (b.dtype, b.shape, raw(b))


def numpy_loader(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """What docs/sparse-files.md says, without torch, safetensors and us: raw elements as unsigned integers."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    outer = json.loads(content[8 : 8 + length])
    header = json.loads(outer["__metadata__"]["feather_param sparse"])
    sizes = {"64": 8, "32": 4, "16": 2, "8": 1, "l": 1, "8_e4m3fn": 1, "8_e5m2": 1, "x64": 8, "128": 16}
    result = {}
    for name, entry in header["tensors"].items():
        assert not entry["zstd"]

        def part(kind, name=name):
            begin, end = outer[f"{kind}:{name}"]["data_offsets"]
            return np.frombuffer(content[8 + length + begin : 8 + length + end], np.uint8)

        digits = entry["dtype"].lstrip("abcdefghijklmnopqrstuvwxyz")
        size = 8 if entry["dtype"] == "complex64" else sizes.get(digits, 1)
        numel = int(np.prod(entry["shape"]))
        elements = part("values").reshape(-1, size)
        if entry["nonzeros"] is not None:
            full, position = np.zeros((numel, size), np.uint8), 0
            stored = iter(elements)
            for gap in part("gaps").tolist():
                position += gap
                if gap < 255:
                    full[position] = next(stored)
                    position += 1
            assert next(stored, None) is None
            elements = full
        crc = zlib.crc32(repr((name, entry["dtype"], entry["shape"], entry["nonzeros"], entry["zstd"])).encode())
        if entry["nonzeros"] is not None:
            crc = zlib.crc32(part("gaps"), crc)
        assert zlib.crc32(part("values"), crc) == entry["crc32"]
        result[name] = (entry["dtype"], elements.reshape(*entry["shape"], size))
    for name, other in header["tied"].items():
        result[name] = result[other]
    return result


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], density: float, seed: int) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    size = torch.empty((), dtype=dtype).element_size()
    n = int(np.prod(shape))
    content = generator.integers(
        0, 2 if dtype == torch.bool else 256, (n, size), np.uint8
    )  # any bits: NaN payloads too
    content[generator.random(n) >= density] = 0
    flat = torch.from_numpy(content.reshape(-1))
    if dtype.is_complex:
        real = flat.view(torch.float32 if dtype == torch.complex64 else torch.float64).reshape(-1, 2)
        return torch.view_as_complex(real).reshape(shape)
    return flat.view(dtype).reshape(shape) if n else torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize("zstd", [False, True], ids=["plain", "zstd"])
@pytest.mark.parametrize("dtype", FLOATS + INTEGERS + OTHERS, ids=str)
@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), max_size=3).map(tuple),
    density=st.sampled_from([0.0, 0.001, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_the_same_bits_come_back(tmp_path_factory, dtype, zstd, shape, density, seed):
    path = tmp_path_factory.getbasetemp() / "round.safetensors"
    tensors = {"a": random_tensor(dtype, shape, density, seed), "b.c": random_tensor(dtype, (3000,), density, seed)}
    save_sparse(tensors, path, zstd=zstd)
    loaded = load_sparse(path)
    assert list(loaded) == list(tensors)
    assert all(identical(loaded[name], tensor) for name, tensor in tensors.items())
    if not zstd:
        for name, (kind, content) in numpy_loader(path).items():
            assert kind == str(dtype).removeprefix("torch.")
            assert content.tobytes() == raw(tensors[name])


@pytest.mark.parametrize("run", [0, 1, 253, 254, 255, 256, 509, 510, 511, 765, 100_000])
def test_long_gaps(tmp_path, run):
    for before, behind in [(run, 0), (0, run), (run, run)]:
        tensor = torch.cat([torch.zeros(before), torch.tensor([float("nan")]), torch.zeros(behind)])
        save_sparse({"t": tensor}, tmp_path / "t")
        assert identical(load_sparse(tmp_path / "t")["t"], tensor)
    save_sparse({"t": torch.zeros(run)}, tmp_path / "t")
    assert identical(load_sparse(tmp_path / "t")["t"], torch.zeros(run))


def test_negative_zero_is_not_zero(tmp_path):
    tensor = torch.zeros(1000)
    tensor[7] = -0.0
    save_sparse({"t": tensor}, tmp_path / "t")
    assert load_sparse(tmp_path / "t")["t"][7].signbit()


def test_tied_views_and_layouts(tmp_path):
    weight = torch.randn(20, 30)
    state = {
        "a": weight,
        "b": weight,
        "transposed": weight.t(),
        "part": weight[3:5],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(7),
        "parameter": nn.Parameter(torch.randn(3)),
    }
    save_sparse(state, tmp_path / "t")
    loaded = load_sparse(tmp_path / "t")
    assert loaded["a"] is loaded["b"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert (tmp_path / "t").stat().st_size < sum(tensor.numel() for tensor in state.values()) * 4


def test_models(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100), nn.Linear(100, 10))
    feather_param.sparsify(model, final_rate=0.95, total_steps=1, schedule=schedules.constant)
    save_sparse(model, tmp_path / "sparsified")
    feather_param.desparsify(model)
    save_sparse(model, tmp_path / "baked")
    assert (tmp_path / "baked").read_bytes() == (tmp_path / "sparsified").read_bytes()
    plain = nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100), nn.Linear(100, 10))
    plain.load_state_dict(load_sparse(tmp_path / "baked"))
    assert all(identical(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True))
    assert (tmp_path / "baked").stat().st_size < 0.25 * 4 * 11_110


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "t"
    save_sparse({"t": torch.ones(3)}, path)
    before = path.read_bytes()

    def fail(self, content):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        save_sparse({"t": torch.zeros(3)}, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"epoch": 3}, "got int at epoch; leave it out"),
        ({"w": torch.eye(3).to_sparse()}, "got a torch.sparse_coo tensor of torch.float32 at w"),
    ],
)
def test_what_cannot_be_stored(tmp_path, state, message):
    with pytest.raises(TypeError, match="expected dense tensors of plain dtypes, " + message):
        save_sparse(state, tmp_path / "t")
    assert not list(tmp_path.iterdir())


def example(path: Path, zstd: bool) -> bytes:
    torch.manual_seed(0)
    sparse = torch.where(torch.rand(40, 30) < 0.1, torch.randn(40, 30), 0.0)
    save_sparse({"sparse": sparse, "dense": torch.randn(8), "n": torch.tensor(3)}, path, zstd=zstd)
    return path.read_bytes()


@pytest.mark.parametrize("zstd", [False, True], ids=["plain", "zstd"])
def test_mutated_files_are_refused_or_harmless(tmp_path, zstd):
    """Whatever happens to the bytes: the same tensors, or a ValueError; nothing else, and no memory to speak of."""
    path = tmp_path / "t"
    content = example(path, zstd)
    whole = load_sparse(path)
    generator = random.Random(0)
    refused = 0
    for _ in range(10_000):
        mutated = bytearray(content)
        kind = generator.randrange(5)
        where = generator.randrange(len(mutated))
        if kind == 0:
            mutated[where] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del mutated[where:]
        elif kind == 2:
            del mutated[where : where + generator.randrange(1, 9)]
        elif kind == 3:
            mutated[where:where] = generator.randbytes(generator.randrange(1, 9))
        else:
            digits = [i for i, byte in enumerate(mutated[:1200]) if 48 <= byte <= 57]
            mutated[generator.choice(digits)] = generator.randrange(48, 58)
        path.write_bytes(mutated)
        try:
            loaded = load_sparse(path)
        except ValueError:
            refused += 1
            continue
        assert loaded.keys() == whole.keys()
        assert all(identical(tensor, whole[name]) for name, tensor in loaded.items())
    assert refused > 9_000  # the rest were the same content written in another way, or no change at all


def rewritten(content: bytes, change) -> bytes:
    """Return a file with another header of ours, its checksums made right again: what an attacker would do."""
    (length,) = struct.unpack("<Q", content[:8])
    outer = json.loads(content[8 : 8 + length])
    header = json.loads(outer["__metadata__"]["feather_param sparse"])
    data = {
        name: np.frombuffer(content[8 + length + e["data_offsets"][0] : 8 + length + e["data_offsets"][1]], np.uint8)
        for name, e in outer.items()
        if name != "__metadata__"
    }
    change(header["tensors"])
    for name, entry in header["tensors"].items():
        parts = {part: data[f"{part}:{name}"] for part in ("gaps", "values") if f"{part}:{name}" in data}
        with contextlib.suppress(TypeError):
            entry["crc32"] = files._crc(name, files._Entry(**entry), parts)
    outer["__metadata__"]["feather_param sparse"] = json.dumps(header)
    new = json.dumps(outer).encode()
    return struct.pack("<Q", len(new)) + new + content[8 + length :]


HOSTILE = {
    "a huge shape": lambda tensors: tensors["sparse"].update(shape=[2**40, 2**20]),
    "a huge dense shape": lambda tensors: tensors["dense"].update(shape=[2**50]),
    "a negative shape": lambda tensors: tensors["sparse"].update(shape=[-40, -30]),
    "a fractional shape": lambda tensors: tensors["sparse"].update(shape=[40.0, 30]),
    "a smaller shape": lambda tensors: tensors["sparse"].update(shape=[4, 30]),
    "more values": lambda tensors: tensors["sparse"].update(nonzeros=10**9),
    "fewer values": lambda tensors: tensors["sparse"].update(nonzeros=3),
    "another dtype": lambda tensors: tensors["sparse"].update(dtype="float64"),
    "a dtype that is code": lambda tensors: tensors["sparse"].update(dtype="__class__"),
    "zstd that is none": lambda tensors: tensors["sparse"].update(zstd=True),
    "not an entry": lambda tensors: tensors.update(sparse=3),
    "a part that is not there": lambda tensors: tensors.update(other=dict(tensors["dense"])),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_headers_that_lie_are_refused(tmp_path, change):
    path = tmp_path / "t"
    path.write_bytes(rewritten(example(path, zstd=False), change))
    with pytest.raises(ValueError, match=r"expected a whole file of save_sparse, got .*, which is damaged: "):
        load_sparse(path)


def test_a_compressed_bomb_is_refused(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "t"
    content = rewritten(example(path, zstd=True), lambda tensors: tensors["sparse"].update(shape=[10**7, 30]))
    path.write_bytes(content)
    with pytest.raises(ValueError, match="sparse claims 300000000 elements, more than so few bytes can hold"):
        load_sparse(path)
    bomb = np.frombuffer(zstandard.ZstdCompressor().compress(bytes(10**8)), np.uint8)
    with pytest.raises(ValueError, match="larger than it may be"):
        files._expand(bomb, 10**6)


def test_other_files(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "torch.pt")
    (tmp_path / "empty").touch()
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"w": torch.ones(2)}, tmp_path / "plain.safetensors")
    for name in ("torch.pt", "empty", "plain.safetensors"):
        with pytest.raises(
            ValueError, match=r"expected a file of save_sparse, got .*, which is damaged or another one"
        ):
            load_sparse(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_sparse(tmp_path / "missing")
    content = example(tmp_path / "t", zstd=False).replace(b'\\"version\\":1', b'\\"version\\":7')
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"sparse file of version 1, got 7 in .*load it with the feather_param release"
    ):
        load_sparse(tmp_path / "t")


@pytest.mark.parametrize(("module", "call"), [("safetensors.torch", "plain"), ("zstandard", "zstd")])
def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    library = module.partition(".")[0]
    with pytest.raises(ImportError, match=rf"expected {library} to be installed: pip install 'feather_param\[files\]'"):
        save_sparse({"w": torch.zeros(100)}, tmp_path / "t", zstd=call == "zstd")

"""Sparse files: bit for bit the same comes back, they are small, and a damaged one is told."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import struct
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import feather_param
from feather_param import container, files, load_sparse, save_sparse, schedules

DTYPES = list(files._DTYPES.values())
SIZES = {  # bytes of an element, from the page
    **dict.fromkeys(["bool", "uint8", "int8", "float4_e2m1fn_x2", "bits8", "bits1x8", "bits2x4", "bits4x2"], 1),
    **{f"float8_{kind}": 1 for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")},
    **{f"{sign}int{n}": 1 for sign in ("", "u") for n in range(1, 8)},
    **dict.fromkeys(["float16", "bfloat16", "int16", "uint16", "bits16", "complex32", "bcomplex32"], 2),
    **dict.fromkeys(["float32", "int32", "uint32", "complex64"], 4),
    **dict.fromkeys(["float64", "int64", "uint64", "complex128"], 8),
}


def bits(tensor: torch.Tensor) -> bytes:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().view(same_size).contiguous().reshape(-1).numpy().tobytes()


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b))


class Refused(Exception):
    pass


def must(condition: object) -> None:
    if not condition:
        raise Refused


def read(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """What docs/sparse-files.md says, one gap after the other, without torch, safetensors and us."""
    try:
        outer, data = _container(content)
        text = outer.pop("__metadata__")["feather_param sparse"]
        must(outer["crc"] == str(zlib.crc32(text.encode())))
        header = json.loads(text, object_pairs_hook=_once)
        must(type(header["version"]) is int and header["version"] == 1)
        result: dict[str, Any] = {}
        described: set[str] = set()
        for name, entry in header["tensors"].items():
            if isinstance(entry, str):
                must(entry in described)
                result[name] = result[entry]
                continue
            must(set(entry) == {"dtype", "shape", "zstd", "crc32"} and type(entry["zstd"]) is bool)
            described.add(name)
            gaps, values = data.pop(f"gaps:{name}", None), data.pop(f"values:{name}")
            must(type(entry["crc32"]) is int and zlib.crc32((gaps or b"") + values) == entry["crc32"])
            result[name] = (entry["dtype"], entry["shape"], _tensor(entry, gaps, values))
        must(not data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise Refused from error
    return result


def _container(content: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    (length,) = struct.unpack("<Q", content[:8])
    must(length <= len(content) - 8)
    outer = json.loads(content[8 : 8 + length].decode(), object_pairs_hook=_once)
    metadata = outer.pop("__metadata__")
    end, data = 0, {}
    for name, part in sorted(outer.items(), key=lambda item: item[1]["data_offsets"]):
        must(set(part) == {"dtype", "shape", "data_offsets"} and len(part["data_offsets"]) == 2)
        (begin, stop), (n,) = part["data_offsets"], part["shape"]
        must(part["dtype"] == "U8" and {type(begin), type(stop)} == {int})
        must(begin == end and stop - begin == n >= 0)
        data[name], end = content[8 + length :][begin:stop], stop
    must(end == len(content) - 8 - length)
    return {"__metadata__": metadata, "crc": metadata["feather_param crc32"]}, data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    must(len(dict(pairs)) == len(pairs))
    return dict(pairs)


def _tensor(entry: dict[str, Any], gaps: bytes | None, values: bytes) -> bytes:
    must(type(entry["shape"]) is list and all(type(n) is int and 0 <= n < 2**63 for n in entry["shape"]))
    size = SIZES[entry["dtype"]]
    both = 2 if "complex" in entry["dtype"] else 1
    numel = math.prod(entry["shape"]) * both
    must(numel or math.prod(n for n in entry["shape"] if n) * size * both < 2**63)
    must(numel * size <= 2048 * (len(gaps or b"") + len(values) + 1))
    if entry["zstd"]:
        gaps = gaps if gaps is None else _expanded(gaps, numel)
        values = _expanded(values, numel * size)
        must(len(values) % size == 0)
        values = np.frombuffer(values, np.uint8).reshape(size, -1).T.tobytes()
    if gaps is None:
        must(len(values) == numel * size)
        return values
    full, position, taken = bytearray(numel * size), 0, 0
    for gap in gaps:
        position += gap
        if gap < 255:
            must(position < numel and taken + size <= len(values))
            full[position * size : (position + 1) * size] = values[taken : taken + size]
            position, taken = position + 1, taken + size
    must(taken == len(values) and 0 <= numel - position < 255)
    return bytes(full)


def _expanded(frame: bytes, most: int) -> bytes:
    import zstandard

    try:
        must(0 <= zstandard.frame_content_size(frame) <= most)
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Refused from error


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], density: float, seed: int) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    size, n = dtype.itemsize, int(np.prod(shape))
    content = generator.integers(0, 2 if dtype == torch.bool else 256, (n, size), np.uint8)  # NaN payloads too
    content[generator.random(n) >= density] = 0
    return torch.from_numpy(content.reshape(-1)).view(dtype).reshape(shape)


@pytest.mark.filterwarnings("ignore:B?Complex(32|Half) support is experimental")
@pytest.mark.parametrize("zstd", [False, True], ids=["plain", "zstd"])
@settings(max_examples=300, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 40), max_size=3).map(tuple),
    density=st.sampled_from([0.0, 0.001, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_the_same_bits_come_back(tmp_path_factory, zstd, dtype, shape, density, seed):
    path = tmp_path_factory.getbasetemp() / "round.safetensors"
    tensors = {"a": random_tensor(dtype, shape, density, seed), "b.c": random_tensor(dtype, (1500,), density, seed)}
    save_sparse(tensors, path, zstd=zstd)
    loaded = load_sparse(path)
    assert list(loaded) == list(tensors)
    assert all(identical(loaded[name], tensor) for name, tensor in tensors.items())
    for name, (kind, sizes, content) in read(path.read_bytes()).items():
        assert (kind, sizes) == (str(dtype).removeprefix("torch."), list(tensors[name].shape))
        assert content == bits(tensors[name])


def test_the_example_of_the_page(tmp_path):
    save_sparse({"t": torch.cat([torch.zeros(300), torch.ones(1), torch.zeros(600)])}, tmp_path / "t")
    _, data = _container((tmp_path / "t").read_bytes())
    assert data == {"gaps:t": bytes([255, 45, 255, 255]), "values:t": bytes([0, 0, 128, 63])}


@pytest.mark.parametrize("zstd", [False, True], ids=["plain", "zstd"])
def test_safetensors_reads_the_container(tmp_path, zstd):
    safetensors = pytest.importorskip("safetensors")
    content = example(tmp_path / "t", zstd)
    with safetensors.safe_open(tmp_path / "t", "numpy") as file:
        _, data = _container(content)
        assert {name: file.get_tensor(name).tobytes() for name in file.keys()} == data  # noqa: SIM118


@pytest.mark.parametrize("run", [0, 1, 253, 254, 255, 256, 509, 510, 511, 765, 65_535, 65_536, 65_537, 200_000])
def test_long_gaps(tmp_path, run):
    for before, behind in [(run, 0), (0, run), (run, run)]:
        tensor = torch.cat([torch.zeros(before), torch.tensor([float("nan")]), torch.zeros(behind)])
        save_sparse({"t": tensor}, tmp_path / "t")
        assert identical(load_sparse(tmp_path / "t")["t"], tensor)
    save_sparse({"t": torch.zeros(run)}, tmp_path / "t")
    assert identical(load_sparse(tmp_path / "t")["t"], torch.zeros(run))


@pytest.mark.parametrize("density", [1e-5, 1e-3, 0.1, 0.79, 0.81])
def test_tensors_of_many_blocks(tmp_path, density):
    tensor = random_tensor(torch.float32, (700, 1000), density, seed=0)
    save_sparse({"t": tensor}, tmp_path / "t")
    assert identical(load_sparse(tmp_path / "t")["t"], tensor)
    assert read((tmp_path / "t").read_bytes())["t"][2] == bits(tensor)


def test_negative_zero_is_not_zero(tmp_path):
    tensor = torch.zeros(1000)
    tensor[7] = -0.0
    save_sparse({"t": tensor}, tmp_path / "t")
    assert load_sparse(tmp_path / "t")["t"][7].signbit()


def test_tied_tensors_and_views(tmp_path):
    weight, number = torch.randn(20, 30), torch.randn(5, dtype=torch.complex64)
    state = {
        "a": weight,
        "between": torch.randn(3),
        "b": weight,
        "transposed": weight.t(),
        "part": weight[3:5],
        "other dtype": weight.view(torch.int32),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(7),
        "parameter": nn.Parameter(torch.randn(3)),
        "conj": number.conj(),  # lies where number does, and is another one
        "number": number,
        "neg": number.conj().imag,
        "ranks": torch.ones([1] * 100),
    }
    save_sparse(state, tmp_path / "t")
    loaded = load_sparse(tmp_path / "t")
    assert list(loaded) == list(state)
    assert loaded["a"] is loaded["b"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert (tmp_path / "t").stat().st_size < 4096 + sum(t.nbytes for t in state.values()) - weight.nbytes


def test_a_mapping_that_makes_its_tensors_is_not_taken_for_tied(tmp_path):
    class Lazy(dict):
        def __getitem__(self, name):
            return torch.full((1000,), super().__getitem__(name))

        def items(self):
            return ((name, self[name]) for name in self)

    save_sparse(Lazy(a=1.0, b=2.0), tmp_path / "t")
    assert {name: int(tensor[0]) for name, tensor in load_sparse(tmp_path / "t").items()} == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "name", ["", ":", "gaps:a", "values:a", "__metadata__", "a b\n\0\\\"'/", "é\u0301 重み \U0001f600", "x" * 5000]
)
def test_any_name(tmp_path, name):
    state = {"a": torch.eye(30), name: torch.eye(40), name + "'": torch.zeros(0, 3)}
    save_sparse(state, tmp_path / "t")
    loaded = load_sparse(tmp_path / "t")
    assert list(loaded) == list(state)
    assert all(identical(loaded[name], tensor) for name, tensor in state.items())
    assert list(read((tmp_path / "t").read_bytes())) == list(state)


def test_loaded_tensors_are_their_own(tmp_path):
    save_sparse({"a": torch.ones(3), "b": torch.eye(30), "none": torch.zeros(0)}, tmp_path / "t")
    loaded = load_sparse(tmp_path / "t")
    loaded["a"].fill_(2)
    assert loaded["b"].sum() == 30
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.values() if tensor.numel())
    stream = io.BytesIO()
    torch.save(loaded["a"], stream)
    assert len(stream.getvalue()) < 3000  # not the whole block
    save_sparse({}, tmp_path / "t")
    assert load_sparse(tmp_path / "t") == {}


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


@pytest.mark.parametrize(
    ("rate", "plain", "zstd"), [(0.9, 1.33, 1.1), (0.95, 0.69, 0.59), (0.98, 0.31, 0.27), (0.99, 0.18, 0.16)]
)
def test_a_tenth_of_resnet50(tmp_path, rate, plain, zstd):
    """A tenth of the sizes promised for ResNet-50, with weights that are normal and pruned everywhere alike."""
    torch.manual_seed(0)
    n = 2_550_000
    weight = torch.randn(n)
    weight = torch.where(weight.abs() > weight.abs().kthvalue(round(rate * n)).values, weight, 0)
    state = {"weight": weight, "norms and biases": torch.randn(10_724)}
    for limit, compress in ((plain, False), (zstd, True)):
        save_sparse(state, tmp_path / "t", zstd=compress)
        assert (tmp_path / "t").stat().st_size < limit * 1e6


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "t"
    save_sparse({"t": torch.ones(3)}, path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="disk full"):
            save_sparse({"t": torch.zeros(3)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        save_sparse({"t": torch.zeros(3)}, tmp_path / "no such folder" / "t")
    with pytest.raises(IsADirectoryError):
        save_sparse({"t": torch.zeros(3)}, tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions and links are POSIX's")
def test_permissions_and_links_stay(tmp_path):
    old = os.umask(0o027)
    try:
        save_sparse({"t": torch.ones(3)}, tmp_path / "t")
    finally:
        os.umask(old)
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o640
    (tmp_path / "t").chmod(0o604)
    (tmp_path / "link").symlink_to("t")
    save_sparse({"t": torch.zeros(3)}, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o604
    assert not load_sparse(tmp_path / "t")["t"].any()


def test_many_writers_of_one_file(tmp_path):
    """Whoever comes last: the file is one of theirs, whole, at any moment."""
    states = [{"t": torch.full((10_000,), float(i + 1))} for i in range(4)]
    save_sparse(states[0], tmp_path / "t")
    failed: list[BaseException] = []

    def write(state):
        try:
            for _ in range(25):
                save_sparse(state, tmp_path / "t")
                assert load_sparse(tmp_path / "t")["t"].unique().numel() == 1
        except BaseException as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(state,)) for state in states]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failed
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_memory(tmp_path):
    """Saving takes what is written and little more, loading what comes out and little more; torch's own not counted."""
    weight = random_tensor(torch.float32, (4_000_000,), 0.1, seed=0)
    dense = random_tensor(torch.float32, (4_000_000,), 1.0, seed=0)
    for state, saving, loading in (({"t": weight}, 0.5, 1.3), ({"t": dense}, 0.1, 2.1)):
        tracemalloc.start()
        try:
            save_sparse(state, tmp_path / "t")
            assert tracemalloc.get_traced_memory()[1] < saving * weight.nbytes
            tracemalloc.reset_peak()
            loaded = load_sparse(tmp_path / "t")
            assert tracemalloc.get_traced_memory()[1] < loading * weight.nbytes
        finally:
            tracemalloc.stop()
        assert identical(loaded["t"], state["t"])


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as torchao's and many others are."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (3,), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"epoch": 3}, "expected dense tensors of plain dtypes, got int at epoch; leave it out"),
        ({"w": torch.eye(3).to_sparse()}, "plain dtypes, got a torch.sparse_coo tensor of torch.float32 at w; leave"),
        ({"w": torch.empty(3, device="meta")}, "expected tensors with content, got one on meta without at w; load it"),
        ({"w": Wrapper()}, "expected tensors with content, got one on cpu without at w; load it first"),
        (
            {"w": nn.LazyLinear(3).weight},
            "expected tensors with content, got a lazy parameter at w; run the model once",
        ),
        ({3: torch.eye(3)}, "expected names to be strings of Unicode, got 3; rename it"),
        ({"\ud800": torch.eye(3)}, r"expected names to be strings of Unicode, got .*ud800'; rename it"),
    ],
)
def test_what_cannot_be_stored(tmp_path, state, message):
    with pytest.raises(TypeError, match=message):
        save_sparse(state, tmp_path / "t")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_tensors_are_refused(tmp_path):
    quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
    with pytest.raises(TypeError, match=r"plain dtypes, got a torch.strided tensor of torch.quint8 at w; leave it out"):
        save_sparse({"w": quantised}, tmp_path / "t")


def test_sharded_tensors_are_refused(tmp_path):
    distributed = pytest.importorskip("torch.distributed.tensor")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = distributed.distribute_tensor(torch.eye(4), mesh, [distributed.Shard(0)])
        with pytest.raises(
            TypeError, match=r"expected whole tensors, got one sharded over processes at w; call full_ten"
        ):
            save_sparse({"w": sharded}, tmp_path / "t")
        save_sparse({"w": sharded.full_tensor()}, tmp_path / "t")
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(load_sparse(tmp_path / "t")["w"], torch.eye(4))


def example(path: Path, zstd: bool) -> bytes:
    torch.manual_seed(0)
    state = {
        "sparse": torch.where(torch.rand(20, 30) < 0.2, torch.randint(1, 9, (20, 30)) / 8, 0.0),
        "dense": torch.randn(8, dtype=torch.complex64),
        "thin": torch.zeros(900, dtype=torch.bfloat16).index_fill(0, torch.tensor([7, 300]), 1.0),
        "n": torch.tensor(3),
        "none": torch.zeros(0, 4),
    }
    save_sparse({**state, "tied": state["sparse"]}, path, zstd=zstd)
    assert (b'\\"zstd\\":true' in path.read_bytes()) == zstd
    return path.read_bytes()


def agree(path: Path, content: bytes) -> bool:
    """Load a file as we do and as the page says; return whether both refuse it, and fail where only one does."""
    path.unlink()  # which is quicker than cutting it short
    path.write_bytes(content)
    try:
        expected = read(content)
    except Refused:
        expected = None
    try:
        loaded = load_sparse(path)
    except ValueError:
        loaded = None
    assert (loaded is None) == (expected is None)
    if loaded is None or expected is None:
        return True
    assert list(loaded) == list(expected)
    for name, (dtype, shape, raw) in expected.items():
        assert (str(loaded[name].dtype), list(loaded[name].shape), bits(loaded[name])) == (f"torch.{dtype}", shape, raw)
    return False


def damaged(content: bytes, generator: random.Random) -> bytes:
    """Return a file with bytes flipped, lost, added, or another digit."""
    mutated = bytearray(content)
    where = generator.randrange(len(mutated))
    kind = generator.randrange(5)
    if kind == 0:
        mutated[where] ^= 1 << generator.randrange(8)
    elif kind == 1:
        del mutated[where:]
    elif kind == 2:
        del mutated[where : where + generator.randrange(1, 9)]
    elif kind == 3:
        mutated[where:where] = generator.randbytes(generator.randrange(1, 9))
    else:
        digits = [i for i, byte in enumerate(mutated[:2000]) if 48 <= byte <= 57]
        mutated[generator.choice(digits)] = generator.randrange(48, 58)
    return bytes(mutated)


def forged(content: bytes, change: Callable[[dict[str, Any], dict[str, bytes]], object]) -> bytes:
    """Return a file with other tensors or parts and right checksums: what an attacker would write."""
    outer, data = _container(content)
    tensors = json.loads(outer["__metadata__"]["feather_param sparse"])["tensors"]
    change(tensors, data)
    for name, entry in tensors.items():
        if isinstance(entry, dict) and "crc32" in entry:
            entry["crc32"] = zlib.crc32(data.get(f"gaps:{name}", b"") + data.get(f"values:{name}", b""))
    text = json.dumps({"version": 1, "tensors": tensors})
    file = io.BytesIO()
    metadata = {"feather_param sparse": text, "feather_param crc32": str(zlib.crc32(text.encode()))}
    container.write(file, metadata, {name: np.frombuffer(part, np.uint8) for name, part in data.items()})
    return file.getvalue()


ODD: list[Any] = [0, 1, -1, 254, 255, 256, 2**31, 2**53, 2**63 - 1, 2**63, 10**400, 1.0, 1e400, True, None, "1", [], {}]


def forge(generator: random.Random, tensors: dict[str, Any], data: dict[str, bytes]) -> None:
    """Change something in what a file says or holds."""
    name = generator.choice(list(tensors))
    entry = tensors[name]
    part = generator.choice(list(data))
    content = bytearray(data[part])
    where = generator.randrange(len(content) + 1)
    kind = generator.randrange(9)
    if kind == 0 and isinstance(entry, dict):
        entry[generator.choice(list(entry))] = generator.choice(ODD)
    elif kind == 1 and isinstance(entry, dict) and entry["shape"]:
        entry["shape"][generator.randrange(len(entry["shape"]))] = generator.choice([*ODD, *range(18, 33)])
    elif kind == 2 and isinstance(entry, dict):
        entry["dtype"] = generator.choice([*SIZES, "__class__", "qint8", "nn"])
    elif kind == 3 and isinstance(entry, dict):
        entry["zstd"] = not entry["zstd"]
    elif kind == 4:
        tensors[generator.choice([*tensors, "new"])] = generator.choice([*tensors, "new", entry])
    elif kind == 5:
        content[where : where + generator.randrange(3)] = generator.choices([0, 1, 254, 255], k=generator.randrange(3))
        data[part] = bytes(content)
    elif kind == 6:
        content[where : where + 1] = generator.randbytes(1)
        data[part] = bytes(content)
    elif kind == 7:
        data[generator.choice([*data, "gaps:n", "values:new"])] = data.pop(part)
    else:
        data[part] = bytes(content[:where]) * generator.randrange(1, 3)


def fuzz(path: Path, zstd: bool, mutate: Callable[[bytes, random.Random], bytes], n: int, seed: int = 0) -> float:
    """Return the fraction of n mutated files that is refused."""
    generator = random.Random(seed)
    content = example(path, zstd)
    assert not agree(path, content)
    with memory_limit(2**25):
        return sum(agree(path, mutate(content, generator)) for _ in range(n)) / n


@contextlib.contextmanager
def memory_limit(extra: int) -> Iterator[None]:
    """Let nothing allocate so many bytes more than there are now: a MemoryError is then a failure (Linux only)."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def forge_some(content: bytes, generator: random.Random) -> bytes:
    def change(tensors, data):
        for _ in range(generator.choice([1, 1, 2, 3])):
            forge(generator, tensors, data)

    return forged(content, change)


@pytest.mark.parametrize("zstd", [False, True], ids=["plain", "zstd"])
def test_damaged_files_are_refused(tmp_path, zstd):
    """Whatever happens to the bytes: a ValueError, or it was the same content written in another way."""
    assert fuzz(tmp_path / "t", zstd, damaged, 5_000) > 0.9


@pytest.mark.filterwarnings("ignore:B?Complex(32|Half) support is experimental")
@pytest.mark.parametrize("zstd", [False, True], ids=["plain", "zstd"])
def test_forged_files_are_refused_or_mean_what_the_page_says(tmp_path, zstd):
    """With right checksums too, nothing but a ValueError, the tensors of the slow reader, and little memory."""
    assert 0.3 < fuzz(tmp_path / "t", zstd, forge_some, 5_000) < 0.95


def entry_of(name: str, **values: Any) -> Callable[[dict[str, Any], dict[str, bytes]], None]:
    return lambda tensors, data: tensors[name].update(values)


HOSTILE = {
    "a huge shape": (
        entry_of("sparse", shape=[2**40, 2**20]),
        "sparse claims more than the .* bytes that so small a part",
    ),
    "a huge dense shape": (entry_of("dense", shape=[2**50]), "dense claims more than"),
    "a shape that takes long to multiply": (entry_of("n", shape=[2**62] * 10**5), "n claims more than"),
    "a shape too large for torch": (
        entry_of("none", shape=[2**62, 2**62, 0]),
        "none claims more than the 9223372036854775807 b",
    ),
    "a negative shape": (entry_of("sparse", shape=[-20, -30]), r"sparse has the shape \[-20, -30\]"),
    "a fractional shape": (entry_of("sparse", shape=[20.0, 30]), "sparse has the shape"),
    "a truth as a shape": (entry_of("n", shape=[True]), "n has the shape"),
    "a smaller shape": (entry_of("sparse", shape=[4, 30]), "sparse: the gaps stand for more elements"),
    "a larger shape": (entry_of("sparse", shape=[400, 30]), "sparse: the gaps stand for fewer elements"),
    "a shape of another size": (entry_of("dense", shape=[9]), "dense: there are 64 bytes of values, for 18 elements"),
    "another dtype": (entry_of("sparse", dtype="float64"), "sparse: .*"),
    "a dtype that is code": (entry_of("sparse", dtype="__class__"), "sparse is of dtype __class__, which torch"),
    "a quantised dtype": (entry_of("sparse", dtype="qint8"), "sparse is of dtype qint8, which torch"),
    "zstd that is none": (entry_of("sparse", zstd=True), "sparse: a compressed part"),
    "a number for a truth": (entry_of("sparse", zstd=0), "sparse is described by"),
    "not an entry": (lambda tensors, data: tensors.update(sparse=3), "sparse is described by 3"),
    "one key too many": (entry_of("sparse", code="import os"), "sparse is described by"),
    "tied to itself": (lambda tensors, data: tensors.update(tied="tied"), "tied is described by tied"),
    "no values": (lambda tensors, data: data.pop("values:sparse"), "sparse has no values"),
    "a part of nothing": (
        lambda tensors, data: data.update({"values:x": b"1"}),
        "it has parts that belong to no tensor",
    ),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_headers_that_lie_are_refused(tmp_path, change, message):
    path = tmp_path / "t"
    path.write_bytes(forged(example(path, zstd=False), change))
    with pytest.raises(ValueError, match=r"expected a whole file of save_sparse, got .*, which is damaged: " + message):
        load_sparse(path)


def test_damage_is_told_with_its_place(tmp_path):
    content = bytearray(example(tmp_path / "t", zstd=False))
    with (tmp_path / "t").open("rb") as file:
        place = container.read_header(file)[1]["values:thin"][0]
    content[place] ^= 1
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(ValueError, match=r"got .*, which is damaged: thin: the checksum is wrong"):
        load_sparse(tmp_path / "t")


def test_compressed_bombs_are_refused(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "t"
    content = example(path, zstd=True)
    bomb = zstandard.ZstdCompressor().compress(bytes(10**8))

    def values(tensors, data):
        data["values:sparse"] = bomb
        tensors["sparse"]["zstd"] = True

    for change, message in (
        (values, "sparse: a compressed part claims 100000000 bytes, more than the 2400 it may have"),
        (entry_of("sparse", shape=[10**7, 30]), "sparse claims more than"),
    ):
        path.write_bytes(forged(content, change))
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=message):
                load_sparse(path)
            assert tracemalloc.get_traced_memory()[1] < 10**6
        finally:
            tracemalloc.stop()
    save_sparse({"zeros": torch.zeros(10**7)}, path, zstd=True)  # a writer does not make what a reader refuses
    assert path.stat().st_size < 50_000
    assert not load_sparse(path)["zeros"].any()


def headed(header: bytes, behind: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + behind


OTHERS = {
    "empty": b"",
    "short": b"\x01",
    "a header longer than the file": struct.pack("<Q", 2**63) + b"{}",
    "not JSON": headed(b"{"),
    "not Unicode": headed(b'{"\xff": 1}'),
    "deep": headed(b"[" * 10**6),
    "a huge number": headed(b'{"__metadata__": ' + b"9" * 10**5 + b"}"),
    "a list": headed(b"[]"),
    "no metadata": headed(b"{}"),
    "metadata of another kind": headed(b'{"__metadata__": []}'),
    "of others": headed(b'{"__metadata__": {"format": "pt"}}'),
    "a name twice": headed(b'{"__metadata__": {}, "__metadata__": {"feather_param sparse": "{}"}}'),
    "a number for the text": headed(b'{"__metadata__": {"feather_param sparse": 1}}'),
    "no version": headed(b'{"__metadata__": {"feather_param sparse": "{}"}}'),
    "deep inside": headed(json.dumps({"__metadata__": {"feather_param sparse": "[" * 10**5}}).encode()),
    **{
        f"a part {kind}": headed(
            json.dumps({"__metadata__": {"feather_param sparse": "{}"}, "a": part}).encode(), b"1234"
        )
        for kind, part in {
            "of another kind": 3,
            "past the end": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]},
            "short of the end": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "behind a hole": {"dtype": "U8", "shape": [3], "data_offsets": [1, 4]},
            "backwards": {"dtype": "U8", "shape": [-4], "data_offsets": [4, 0]},
            "of floats": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "of fractions": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4.0]},
            "of one offset": {"dtype": "U8", "shape": [4], "data_offsets": [4]},
        }.items()
    },
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
def test_other_files(tmp_path, content):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a file of save_sparse, got .*t, which is damaged or another one"):
        load_sparse(tmp_path / "t")


def test_files_of_other_programs(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "torch.pt")
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"w": torch.ones(2)}, tmp_path / "plain.safetensors")
    for name in ("torch.pt", "plain.safetensors"):
        with pytest.raises(ValueError, match="damaged or another one"):
            load_sparse(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_sparse(tmp_path / "missing")
    content = example(tmp_path / "t", zstd=False)
    (tmp_path / "t").write_bytes(content.replace(b'\\"version\\":1', b'\\"version\\":7'))
    with pytest.raises(
        ValueError, match=r"sparse file of version 1, got 7 in .*load it with the feather_param release"
    ):
        load_sparse(tmp_path / "t")
    (tmp_path / "t").write_bytes(content.replace(b"float32", b"float16", 1))
    with pytest.raises(ValueError, match=r"damaged: the checksum of the header is wrong"):
        load_sparse(tmp_path / "t")


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError, match=r"expected zstandard to be installed: pip install 'feather_param\[files\]'"):
        save_sparse({"w": torch.zeros(100)}, tmp_path / "t", zstd=True)
    assert not list(tmp_path.iterdir())
    save_sparse({"w": torch.zeros(100)}, tmp_path / "t")  # which needs nothing
    assert load_sparse(tmp_path / "t")["w"].shape == (100,)

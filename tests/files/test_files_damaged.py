"""Sparse files that are damaged, foreign or forged: a clear error, no crash, little memory."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import save

from feather_param import load_sparse, save_sparse
from feather_param.files import sparse as files
from tests.files.sparse_files import SIZES, Refused, parts_of, read
from tests.files.test_files import bits, example


def agree(path: Path, content: bytes) -> bool:
    """Load a file as we do and as the page says; return whether both refuse it, and fail where only one does."""
    path.unlink()  # which is quicker than cutting it short
    path.write_bytes(content)
    try:
        expected = read(content)
    except Refused:
        expected = None
    if expected and not all(hasattr(torch, dtype) for dtype, *_ in expected.values()):  # one that this torch lacks
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
    outer, data = parts_of(content)
    tensors = json.loads(outer["__metadata__"]["feather_param sparse"])["tensors"]
    change(tensors, data)
    for name, entry in tensors.items():
        if isinstance(entry, dict) and "crc32" in entry:
            entry["crc32"] = zlib.crc32(data.get(f"gaps:{name}", b"") + data.get(f"values:{name}", b""))
    text = json.dumps({"version": 1, "tensors": tensors})
    metadata = {"feather_param sparse": text, "feather_param crc32": str(zlib.crc32(text.encode()))}
    return save({name: np.frombuffer(part, np.uint8) for name, part in data.items()}, metadata)


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
    elif kind == 1 and isinstance(entry, dict) and isinstance(entry["shape"], list) and entry["shape"]:
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
    "something deep": (
        entry_of("sparse", dtype=functools.reduce(lambda x, _: [x], range(900), 1)),
        "sparse is of dtype",
    ),
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
    header = json.loads(content[8 : (start := 8 + int.from_bytes(content[:8], "little"))])
    content[start + header["values:thin"]["data_offsets"][0]] ^= 1
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
    "a version that is true": headed(b'{"__metadata__": {"feather_param sparse": "{\\"version\\": true}"}}'),
    "a deep version": headed(
        json.dumps({"__metadata__": {"feather_param sparse": '{"version": ' + "[" * 900 + "]" * 900 + "}"}}).encode()
    ),
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


class Encoded(os.PathLike):
    def __init__(self, path: Path) -> None:
        self.path = os.fsencode(path)

    def __fspath__(self) -> bytes:
        return self.path


@pytest.mark.skipif(sys.platform == "win32", reason="pipes are POSIX's")
def test_paths_of_other_kinds(tmp_path):
    content = example(tmp_path / "t", zstd=False)
    assert load_sparse(Encoded(tmp_path / "t")).keys() == load_sparse(tmp_path / "t").keys()
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDWR)
    os.write(pipe, content[:9])
    os.mkfifo(tmp_path / "nobody writes")
    for path in (tmp_path / "pipe", tmp_path / "nobody writes", os.devnull):
        with pytest.raises(
            ValueError, match=r"expected a file of save_sparse, got .*, which is damaged or another one"
        ):
            load_sparse(path)
    os.close(pipe)
    with pytest.raises(IsADirectoryError):
        load_sparse(tmp_path)


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path, monkeypatch):
    """An error, not the end of the process, as for memory that is mapped from it."""
    example(tmp_path / "t", zstd=False)

    def cut(tensors, sizes):
        os.truncate(tmp_path / "t", 8)
        return entries(tensors, sizes)

    entries = files._entries
    monkeypatch.setattr(files, "_entries", cut)
    with pytest.raises(ValueError, match=r"expected a whole file of save_sparse, got .*, which is damaged: "):
        load_sparse(tmp_path / "t")


def test_files_of_other_programs(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "torch.pt")
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "plain.safetensors")
    for name, loader in (("torch.pt", "torch.load"), ("plain.safetensors", "safetensors.torch.load_file")):
        with pytest.raises(
            ValueError, match=rf"expected a file of save_sparse, got .*{name}, a .*; load it with {loader}"
        ):
            load_sparse(tmp_path / name)
    with pytest.raises(TypeError, match="expected a path, got int"):
        load_sparse(3)  # type: ignore[arg-type]
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

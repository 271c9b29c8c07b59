"""Sparse files that are damaged or forged: a clear error, no crash, little memory."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from feather_param import load_sparse, save_sparse
from feather_param.files import sparse
from tests.files.sparse_files import SIZES, Refused, parts_of, read
from tests.files.tensors import bits, example


def agree(path: Path, content: bytes) -> bool:
    """Load a file with `load_sparse` and with the slow reader; return whether both refuse it. Fail if only one does."""
    path.unlink()  # faster than truncating it
    path.write_bytes(content)
    try:
        expected = read(content)
    except Refused:
        expected = None
    if expected and not all(
        hasattr(torch, dtype) for dtype, *_ in expected.values()
    ):  # a dtype that this torch does not have
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
    """Return a file with a flipped bit, lost or added bytes, or another digit."""
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
    """Return a file with changed tensors or parts and correct checksums, as an attacker would write it."""
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
    """Change an entry or a part of a file."""
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
    """Return the fraction of n mutated files that are refused."""
    generator = random.Random(seed)
    content = example(path, zstd)
    assert not agree(path, content)
    with memory_limit(2**25):
        return sum(agree(path, mutate(content, generator)) for _ in range(n)) / n


@contextlib.contextmanager
def memory_limit(extra: int) -> Iterator[None]:
    """Limit the memory that can be allocated from now on to ``extra`` bytes (Linux only)."""
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
    """A damaged file raises a ValueError, unless the slow reader reads the same tensors from it."""
    assert fuzz(tmp_path / "t", zstd, damaged, 5_000) > 0.9


@pytest.mark.filterwarnings("ignore:B?Complex(32|Half) support is experimental")
@pytest.mark.parametrize("zstd", [False, True], ids=["plain", "zstd"])
def test_forged_files_are_refused_or_read_as_documented(tmp_path, zstd):
    """Correct checksums too lead to a ValueError or to the tensors of the slow reader, within little memory."""
    assert 0.3 < fuzz(tmp_path / "t", zstd, forge_some, 5_000) < 0.95


def entry_of(name: str, **values: Any) -> Callable[[dict[str, Any], dict[str, bytes]], None]:
    return lambda tensors, data: tensors[name].update(values)


HOSTILE = {
    "a huge shape": (
        entry_of("sparse", shape=[2**40, 2**20]),
        "sparse claims more than the .* bytes that its parts in the file may",
    ),
    "a huge dense shape": (entry_of("dense", shape=[2**50]), "dense claims more than"),
    "a shape whose product is long": (entry_of("n", shape=[2**62] * 64), "n claims more than"),
    "a shape of many sizes": (entry_of("n", shape=[1] * 65), "n has 65 dimensions, more than 64"),
    "a text in a shape": (entry_of("n", shape=["1"]), r"n has the shape \['1'\]"),
    "a negative zero in a shape": (entry_of("n", shape=[-0.0]), r"n has the shape \[-0.0\]"),
    "a shape that is a number": (entry_of("n", shape=4), "n has the shape 4"),
    "a missing key": (lambda tensors, data: tensors["n"].pop("zstd"), "n is described by"),
    "a lone surrogate": (
        lambda tensors, data: tensors.update({"\ud800": "sparse"}),
        r"the name \\ud800 has a lone surr",
    ),
    "a name with control characters": (
        entry_of("sparse", dtype="\x1b[2J\n"),
        r"sparse is of dtype \\x1b\[2J\\n, which torch",
    ),
    "tied to a later tensor": (lambda tensors, data: tensors.update(sparse="n"), "sparse is described by n"),
    "tied to a tied tensor": (lambda tensors, data: tensors.update(again="tied"), "again is described by tied"),
    "a shape too large for torch": (
        entry_of("none", shape=[2**62, 2**62, 0]),
        "none claims more than the 9223372036854775807 b",
    ),
    "a negative shape": (entry_of("sparse", shape=[-20, -30]), r"sparse has the shape \[-20, -30\]"),
    "a fractional shape": (entry_of("sparse", shape=[20.0, 30]), "sparse has the shape"),
    "a bool in a shape": (entry_of("n", shape=[True]), "n has the shape"),
    "a smaller shape": (entry_of("sparse", shape=[4, 30]), "sparse: the gaps have more elements"),
    "a larger shape": (entry_of("sparse", shape=[400, 30]), "sparse: the gaps have fewer elements"),
    "a shape of another size": (entry_of("dense", shape=[9]), "dense: there are 64 bytes of values, for 18 elements"),
    "another dtype": (entry_of("sparse", dtype="float64"), "sparse: .*"),
    "a dtype that is code": (entry_of("sparse", dtype="__class__"), "sparse is of dtype __class__, which torch"),
    "a quantised dtype": (entry_of("sparse", dtype="qint8"), "sparse is of dtype qint8, which torch"),
    "a part that is not compressed": (entry_of("sparse", zstd=True), "sparse: a compressed part"),
    "a number for a bool": (entry_of("sparse", zstd=0), "sparse is described by"),
    "a deeply nested dtype": (
        entry_of("sparse", dtype=functools.reduce(lambda x, _: [x], range(900), 1)),
        "sparse is of dtype",
    ),
    "not an entry": (lambda tensors, data: tensors.update(sparse=3), "sparse is described by 3"),
    "an unknown key": (entry_of("sparse", code="import os"), "sparse is described by"),
    "tied to itself": (lambda tensors, data: tensors.update(tied="tied"), "tied is described by tied"),
    "no values": (lambda tensors, data: data.pop("values:sparse"), "sparse has no values"),
    "a part without a tensor": (
        lambda tensors, data: data.update({"values:x": b"1"}),
        "it has parts that belong to no tensor",
    ),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_wrong_headers_are_refused(tmp_path, change, message):
    path = tmp_path / "t"
    path.write_bytes(forged(example(path, zstd=False), change))
    with pytest.raises(ValueError, match=r"expected a whole file of save_sparse, got .*, which is damaged: " + message):
        load_sparse(path)


def test_the_error_names_the_damaged_tensor(tmp_path):
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
    save_sparse({"zeros": torch.zeros(10**7)}, path, zstd=True)  # a reader would refuse it compressed
    assert path.stat().st_size < 50_000
    assert not load_sparse(path)["zeros"].any()


def test_a_file_that_is_truncated_while_it_is_read_raises(tmp_path, monkeypatch):
    """Reading a truncated file that is mapped into memory would end the process."""
    example(tmp_path / "t", zstd=False)

    def truncate(tensors, sizes):
        os.truncate(tmp_path / "t", 8)
        return entries(tensors, sizes)

    entries = sparse._entries
    monkeypatch.setattr(sparse, "_entries", truncate)
    with pytest.raises(ValueError, match=r"expected a whole file of save_sparse, got .*, which is damaged: "):
        load_sparse(tmp_path / "t")

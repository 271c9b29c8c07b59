"""Headers of sparse files, letter by letter: `load_sparse` refuses what docs/sparse-files.md says, and nothing else."""

from __future__ import annotations

import json
import struct
import zlib

import pytest
import torch

from feather_param import load_sparse
from tests.files.sparse_files import Refused, read
from tests.times import is_linear

DATA = struct.pack("<f", 1.0)
CRC = zlib.crc32(DATA)
PART = '{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'


def described(shape: str = "[1]", dtype: str = '"float32"', zstd: str = "false", crc: object = CRC) -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"zstd":{zstd},"crc32":{crc}}}'


def text_of(tensor: str = described(), version: str = "1", more: str = "", beside: str = "") -> str:
    return f'{{"version":{version},"tensors":{{"w":{tensor}{more}}}{beside}}}'


def file_of(
    text: str = text_of(),
    part: str = PART,
    name: str = "values:w",
    metadata: str = "",
    more: str = "",
    end: bytes = b"",
) -> bytes:
    own = json.dumps({"feather_param sparse": text, "feather_param crc32": str(zlib.crc32(text.encode()))})
    header = f'{{"__metadata__":{own[:-1]}{metadata}}},"{name}":{part}{more}}}'.encode()
    return struct.pack("<Q", len(header)) + header + DATA + end


GOOD = {
    "a plain one": file_of(),
    "64 sizes": file_of(text_of(described("[" + ",".join("1" * 64) + "]"))),
    "a character of two surrogates": file_of(text_of(more=r',"\ud83d\ude00":"w"')),
    "a tied tensor": file_of(text_of(more=',"v":"w"')),
    "other metadata": file_of(metadata=',"by":"another"'),
    "another key of a part": file_of(part=PART[:-1] + ',"by":1}'),
    "spaces": file_of(f" {text_of()}\n"),
    "an empty part": file_of(
        text_of(more=f',"z":{described("[0]", crc=0)}'),
        more=',"values:z":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}',
    ),
}
LONG = "1" * 4000
REFUSED = {
    **{
        f"a version {version[:9]}": (file_of(text_of(version=version)), message)
        for version, message in {
            "2": "of version 1, got 2 in",
            "1.0": "the version is not an int",
            "true": "the version is not an int",
            '"1"': "the version is not an int",
            "NaN": "the version is not an int",
            "9" * 20: f"of version 1, got {'9' * 20} in",
            LONG: "a number in the header is 1{19}…1{20}, of 4000 characters",
            LONG + "5" * 1000: "a number in the header is 1{19}…5{20}, of 5000 characters",
        }.items()
    },
    **{
        f"a size {size[:9]}": (file_of(text_of(described(f"[{size}]"))), message)
        for size, message in {
            "4.0": r"w has the shape \[4.0\]",
            "1e0": r"w has the shape \[1.0\]",
            "1e400": r"w has the shape \[inf\]",
            "NaN": r"w has the shape \[nan\]",
            "-Infinity": r"w has the shape \[-inf\]",
            "-0.0": r"w has the shape \[-0.0\]",
            "-0": "a number in the header is -0",
            "-1": r"w has the shape \[-1\]",
            "true": r"w has the shape \[True\]",
            '"1"': r"w has the shape \['1'\]",
            "null": r"w has the shape \[None\]",
            "[1]": r"w has the shape \[\[1\]\]",
            LONG: "a number in the header is 1{19}…",
        }.items()
    },
    **{
        f"a number {size[:9]} in a part": (file_of(part=f'{{"dtype":"U8","shape":[{size}],"data_offsets":[0,4]}}'), ".")
        for size in ("4.0", "4e0", "1e400", "NaN", "-0", "-0.0", "true", '"4"', LONG, "2,2", "4,1", "")
    },
    **{
        f"offsets {offsets} of a part": (file_of(part=f'{{"dtype":"U8","shape":[4],"data_offsets":[{offsets}]}}'), ".")
        for offsets in ("0,4.0", "-0,4", "0,4,4", "4,0", "1,5", "0,8", "0", '"0",4')
    },
    "a part of another type": (file_of(part=PART.replace("U8", "I8")), "values:w is not stored as bytes"),
    "a part without a key": (file_of(part='{"dtype":"U8","data_offsets":[0,4]}'), "missing field"),
    "a part twice": (file_of(more=f',"values:w":{PART}'), "."),
    "parts that overlap": (file_of(more=f',"values:v":{PART}'), "invalid offset"),
    "bytes after the parts": (file_of(end=b"x"), "not fully covered"),
    "a lone surrogate in the name of a part": (file_of(name=r"values:\ud800"), "invalid JSON"),
    "a lone surrogate in other metadata": (file_of(metadata=r',"by":"\ud800"'), "invalid JSON"),
    "a number in other metadata": (file_of(metadata=',"by":1'), "expected a string"),
    "a lone surrogate in a name": (file_of(text_of(more=r',"\udfff":"w"')), r"the name \\udfff has a lone surrogate"),
    "a name twice": (file_of(text_of(more=',"w":"w"')), "a name occurs twice"),
    "another key beside the tensors": (file_of(text_of(beside=',"by":1')), "a key of the header is missing or unknown"),
    "no tensors": (file_of('{"version":1}'), "a key of the header is missing or unknown"),
    "tensors that are a list": (file_of('{"version":1,"tensors":[]}'), "the header has no tensors"),
    "another key of a tensor": (file_of(text_of(described()[:-1] + ',"by":1}')), "w is described by"),
    "a dtype that is a list": (file_of(text_of(described(dtype='["float32"]'))), "w is of dtype"),
    "zstd that is a number": (file_of(text_of(described(zstd="0"))), "w is described by"),
    "a checksum that is a bool": (file_of(text_of(described(crc="true"))), "w is described by"),
    "a checksum with a fraction": (file_of(text_of(described(crc=f"{CRC}.0"))), "w is described by"),
    "a checksum of more bits": (file_of(text_of(described(crc=CRC + 2**32))), "w: the checksum is wrong"),
    "a byte order mark": (file_of("\ufeff" + text_of()), "BOM"),
    "text after the object": (file_of(text_of() + "\0"), "Extra data"),
    "65 sizes": (file_of(text_of(described("[" + ",".join("1" * 65) + "]"))), "w has 65 dimensions, more than 64"),
}


@pytest.mark.parametrize("content", GOOD.values(), ids=GOOD)
def test_good_headers_are_read(tmp_path, content):
    (tmp_path / "t").write_bytes(content)
    loaded = load_sparse(tmp_path / "t")
    assert torch.equal(loaded["w"].flatten(), torch.ones(1))
    assert {name: list(tensor.shape) for name, tensor in loaded.items()} == {
        name: shape for name, (_, shape, _) in read(content).items()
    }


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_other_headers_are_refused_with_a_short_message(tmp_path, content, message):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(Refused):
        read(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_sparse(tmp_path / "t")
    assert str(caught.value).startswith("expected a ")
    assert len(str(caught.value)) < 400 + len(str(tmp_path))
    assert str(caught.value).isprintable()


def test_a_shape_of_many_sizes_is_refused_in_linear_time(tmp_path):
    def refuse(n: int) -> None:
        with pytest.raises(ValueError, match=f"w has {n} dimensions, more than 64"):
            load_sparse(tmp_path / f"{n}")

    for n in (25_000, 200_000):
        (tmp_path / f"{n}").write_bytes(file_of(text_of(described("[" + ",".join("1" * n) + "]"))))
    assert is_linear(refuse, 25_000)

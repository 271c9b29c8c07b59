"""Files that are no sparse files, and paths that are no files: the error names them."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from feather_param import load_sparse
from tests.files.tensors import example


def headed(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


OTHERS = {
    "empty": b"",
    "short": b"\x01",
    "a header longer than the file": struct.pack("<Q", 2**63) + b"{}",
    "not JSON": headed(b"{"),
    "not Unicode": headed(b'{"\xff": 1}'),
    "deeply nested": headed(b"[" * 10**6),
    "a huge number": headed(b'{"__metadata__": ' + b"9" * 10**5 + b"}"),
    "a list": headed(b"[]"),
    "no metadata": headed(b"{}"),
    "metadata of another kind": headed(b'{"__metadata__": []}'),
    "metadata of another program": headed(b'{"__metadata__": {"format": "pt"}}'),
    "a name twice": headed(b'{"__metadata__": {}, "__metadata__": {"feather_param sparse": "{}"}}'),
    "a number for the inner header": headed(b'{"__metadata__": {"feather_param sparse": 1}}'),
    "no version": headed(b'{"__metadata__": {"feather_param sparse": "{}"}}'),
    "a version that is true": headed(b'{"__metadata__": {"feather_param sparse": "{\\"version\\": true}"}}'),
    "a deeply nested version": headed(
        json.dumps({"__metadata__": {"feather_param sparse": '{"version": ' + "[" * 900 + "]" * 900 + "}"}}).encode()
    ),
    "a deeply nested inner header": headed(
        json.dumps({"__metadata__": {"feather_param sparse": "[" * 10**5}}).encode()
    ),
    **{
        f"a part {kind}": headed(
            json.dumps({"__metadata__": {"feather_param sparse": "{}"}, "a": part}).encode(), b"1234"
        )
        for kind, part in {
            "of another kind": 3,
            "past the end": {"dtype": "U8", "shape": [5], "data_offsets": [0, 5]},
            "short of the end": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "after a hole": {"dtype": "U8", "shape": [3], "data_offsets": [1, 4]},
            "with offsets in reverse order": {"dtype": "U8", "shape": [-4], "data_offsets": [4, 0]},
            "of floats": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "of fractions": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4.0]},
            "of one offset": {"dtype": "U8", "shape": [4], "data_offsets": [4]},
        }.items()
    },
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
def test_files_of_other_kinds_are_refused(tmp_path, content):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a file of save_sparse, got .*t, which is damaged or another one"):
        load_sparse(tmp_path / "t")


class Encoded(os.PathLike):
    def __init__(self, path: Path) -> None:
        self.path = os.fsencode(path)

    def __fspath__(self) -> bytes:
        return self.path


@pytest.mark.skipif(sys.platform == "win32", reason="only POSIX has named pipes")
def test_paths_as_bytes_load_and_pipes_are_refused(tmp_path):
    content = example(tmp_path / "t", zstd=False)
    assert load_sparse(Encoded(tmp_path / "t")).keys() == load_sparse(tmp_path / "t").keys()
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDWR)
    os.write(pipe, content[:9])
    os.mkfifo(tmp_path / "no writer")
    for path in (tmp_path / "pipe", tmp_path / "no writer", os.devnull):
        with pytest.raises(
            ValueError, match=r"expected a file of save_sparse, got .*, which is damaged or another one"
        ):
            load_sparse(path)
    os.close(pipe)
    with pytest.raises(IsADirectoryError):
        load_sparse(tmp_path)


def test_the_error_names_the_loader_of_another_file(tmp_path):
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

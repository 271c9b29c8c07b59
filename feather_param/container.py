"""The safetensors container: named runs of bytes and a little text. Written whole or not at all, read without trust."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["Place", "parse", "read_header", "replacing", "write"]

Place = tuple[int, int]  # where in a file some bytes begin, and where they end


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes a path's place at the end, unless something fails: then it is removed.

    Its name is unlike any other writer's. A link goes on pointing to where it did, a file that was there keeps its
    permissions, and the content is on the disk before the name is.

    Raises:
        ValueError: there is a folder, a device or a pipe, whose place a file would take.
        FileNotFoundError: the folder is not there.
    """
    given, path = path, Path(os.path.realpath(path))
    if path.exists() and not path.is_file():  # to the administrator a device is a name like any other
        kind = "a folder" if path.is_dir() else "a device or pipe, whose place a file would take"
        raise ValueError(f"expected a file or a new name, got {given}, {kind}")
    if not path.parent.is_dir():
        folder = path.parent if given.parent.is_dir() else given.parent  # the former for a link that leads nowhere
        raise FileNotFoundError(errno.ENOENT, "expected a folder that is there, to write a file into", str(folder))
    temporary = path.with_name(f".save_sparse-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write(file: BinaryIO, metadata: Mapping[str, str], parts: Mapping[str, NDArray[np.uint8]]) -> None:
    """Write parts, each as a one-dimensional U8 tensor, and metadata."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, content in parts.items():
        header[name] = {"dtype": "U8", "shape": [content.size], "data_offsets": [end, end + content.size]}
        end += content.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8, as safetensors itself has it
    file.write(struct.pack("<Q", len(text)) + text)
    for content in parts.values():
        file.write(content.data)


def read_header(file: BinaryIO) -> tuple[dict[str, Any], dict[str, Place]]:
    """Return a file's metadata, and where its parts lie.

    Raises:
        ValueError: it is no such file, or one whose parts overlap, leave bytes out or end after it.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise ValueError(f"the header has {length} bytes, the file {size}")
    header = parse(file.read(length).decode())
    metadata = header.pop("__metadata__", None)
    if type(metadata) is not dict:
        raise ValueError("there is no metadata")
    places: dict[str, Place] = {}
    for name, part in header.items():
        if type(part) is not dict or part.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name} is no tensor")
        offsets = part["data_offsets"]
        if type(offsets) is not list or len(offsets) != 2 or not all(type(n) is int for n in offsets):
            raise ValueError(f"{name} has the offsets {offsets!r}")
        begin, end = offsets
        if part["dtype"] != "U8" or part["shape"] != [end - begin]:
            raise ValueError(f"{name} is not stored as bytes")
        places[name] = (8 + length + begin, 8 + length + end)
    last = 8 + length
    for begin, end in sorted(places.values()):
        if begin != last or end < begin:
            raise ValueError("the parts do not follow on one another")
        last = end
    if last != size:
        raise ValueError(f"the parts end at byte {last}, the file at {size}")
    return metadata, places


def parse(text: str) -> dict[str, Any]:
    """Return the object that JSON text stands for, in which no name may stand twice.

    Raises:
        ValueError: it is not JSON, not an object, nested too deeply, or ambiguous.
    """
    try:
        parsed = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("the header is nested too deeply") from error
    if type(parsed) is not dict:
        raise ValueError("the header is not a JSON object")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) != len(pairs):
        raise ValueError("a name stands twice in the header")
    return parsed

"""Files that are written whole or not at all, and the safetensors container, read without trust."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open


def write(file: BinaryIO, metadata: Mapping[str, str], parts: Mapping[str, NDArray[np.uint8]]) -> None:
    """Write parts, each as a one-dimensional U8 tensor, and metadata, in order (safetensors shuffles the latter)."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, content in parts.items():
        header[name] = {"dtype": "U8", "shape": [content.size], "data_offsets": [end, end + content.size]}
        end += content.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    file.write(struct.pack("<Q", len(text)) + text)
    for content in parts.values():
        file.write(content.data)


def opened(path: str | os.PathLike[str]) -> Any:
    """Open a safetensors file; a name that stands twice in it, which the library accepts, is refused.

    Raises:
        ValueError: it is no such file, or one whose parts overlap, leave bytes out or end after it.
        OSError: it cannot be read.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # to open a pipe may take for ever
        raise ValueError("it is a device or pipe")
    with open(path, "rb") as file:
        try:
            # Not mapped into memory: there, a file that somebody cuts short would end the process.
            container = safe_open(os.fsdecode(path), "numpy", backend="pread")
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        parse(file.read(int.from_bytes(file.read(8), "little")).decode())
    return container


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

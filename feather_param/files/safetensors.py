"""The safetensors container: named parts of bytes, and metadata."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from feather_param.utils.text import printable

_MOST_DIGITS = 20  # those of 2^64
_LONGEST_HEADER = 100_000_000  # bytes that the safetensors library reads


def container_of(metadata: Mapping[str, str], parts: Mapping[str, NDArray[np.uint8]]) -> list[memoryview | bytes]:
    """Return the content of a file, in pieces: a header, and the parts in the given order.

    Each part becomes a one-dimensional tensor of dtype U8. The safetensors library writes its metadata in a random
    order, so two files of the same tensors would differ.

    Raises:
        ValueError: the names are too long for a header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, content in parts.items():
        header[name] = {"dtype": "U8", "shape": [content.size], "data_offsets": [end, end + content.size]}
        end += content.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    if len(text) > _LONGEST_HEADER:
        raise ValueError(
            f"expected a header of at most {_LONGEST_HEADER:,} bytes, got {len(text):,}; shorten the tensors' names"
        )
    return [struct.pack("<Q", len(text)) + text, *(content.data for content in parts.values())]


def open_container(path: str | os.PathLike[str]) -> Any:
    """Open a safetensors file with `safetensors.safe_open`, and check that no name occurs twice in its header.

    The library checks everything else.

    Raises:
        ValueError: the path is no regular file, or the file is no valid safetensors file.
        OSError: the file cannot be read.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a pipe may wait for ever
        raise ValueError("it is a device or pipe")
    with open(path, "rb") as file:
        try:
            # "pread" does not map the file into memory. If a mapped file is truncated, reading it ends the process.
            container = safe_open(os.fsdecode(path), "numpy", backend="pread")
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        parse_json(file.read(int.from_bytes(file.read(8), "little")).decode())
    return container


def parse_json(text: str) -> dict[str, Any]:
    """Return the JSON object of a text.

    Raises:
        ValueError: the text is no JSON object, is nested too deeply, an object in it has a name twice, or an integer in
            it is -0 or has more than 20 digits.
    """
    try:
        parsed = json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("the header is nested too deeply") from error
    if type(parsed) is not dict:
        raise ValueError("the header is not a JSON object")
    return parsed


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS or text == "-0":  # int() takes quadratic time, and drops the sign of -0
        raise ValueError(f"a number in the header is {printable(text, 40)}, of {len(text)} characters")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) != len(pairs):
        raise ValueError("a name occurs twice in the header")
    return parsed

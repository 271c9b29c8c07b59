"""Encode an array without its zeros: as the values that are not zero, and the gaps between them.

Note [Gaps and values]

``values`` holds the elements that are not zero, in order. ``gaps`` holds, for each of them, the number of zeros between
it and the element before:

* A byte g < 255 means g zeros and then one element.
* A byte 255 means 255 zeros and no element. A longer gap begins with one or more of these.

For example, the uint8 array ``0 0 7 0 9`` followed by 300 zeros has the gaps ``2 1 255`` and the values ``7 9``. The
last 45 zeros are not stored, because the reader knows the size of the array. `docs/sparse-files.md` specifies the file
format.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feather_param.files.errors import errors_of_memory
from feather_param.utils.extras import extra

Bytes = NDArray[np.uint8]
Elements = NDArray[Any]
"""One-dimensional array of unsigned integers. An element is zero if all its bits are."""

MAX_EXPANSION = 2048
"""Most bytes of a tensor for each stored byte, so that loading a small file cannot take much memory. A gap byte alone
may mean 255 elements of 8 bytes, which is 2040."""

MAX_DIMENSIONS = 64
"""Most dimensions of a tensor, because torch's own operators accept no more."""

_SKIP = 255  # a gap byte that means 255 zeros and no element
_BLOCK = 1 << 16  # elements or gaps that are processed at once, so that temporary arrays stay in the cache
_LEVEL = 12  # of zstandard: level 19 saves 2 % more and takes five times as long


def encode(elements: Elements, zstd: bool) -> tuple[dict[str, Bytes], bool]:
    """Return the parts of an array, and whether they are compressed.

    The parts are ``gaps`` and ``values``, or ``values`` alone if the gaps would take more bytes than the zeros. They
    are compressed if that makes them smaller and if they expand by no more than `MAX_EXPANSION`.

    Args:
        elements: the array.
        zstd: whether to try zstandard.

    Example:
        >>> elements = np.array([0, 0, 7, 0, 9] + 300 * [0], np.uint8)
        >>> parts, _ = encode(elements, zstd=False)
        >>> parts["gaps"].tolist(), parts["values"].tolist()
        ([2, 1, 255], [7, 9])
    """
    parts = {"values": elements.view(np.uint8)}
    count = int(np.count_nonzero(elements))
    if count * (elements.itemsize + 1) < elements.nbytes:
        sparse = _gaps_and_values(elements, count)
        if _nbytes(sparse) < elements.nbytes:
            parts = sparse
    if not zstd:
        return parts, False
    planes = {**parts, "values": parts["values"].reshape(-1, elements.itemsize).T}
    compressed = {part: _compress(content) for part, content in planes.items()}
    if _nbytes(compressed) < _nbytes(parts) and elements.nbytes <= MAX_EXPANSION * _nbytes(compressed):
        return compressed, True
    return parts, False


def decode(parts: Mapping[str, Bytes], zstd: bool, out: Elements) -> None:
    """Write the array that `encode` encoded into ``out``.

    Temporary arrays take little more memory than ``out``.

    Args:
        parts: what `encode` returned.
        zstd: whether the parts are compressed.
        out: zeros, of the array's size.

    Raises:
        ValueError: the parts do not match each other or the size of ``out``.
    """
    values, gaps = parts["values"], parts.get("gaps")
    if zstd:
        gaps = None if gaps is None else _decompress(gaps, len(out))
        values = _decompress(values, out.nbytes)
    count, remainder = divmod(len(values), out.itemsize)
    if remainder or (gaps is None and count != len(out)):
        raise ValueError(f"there are {len(values)} bytes of values, for {len(out)} elements of {out.itemsize} bytes")
    stored = np.empty((count, out.itemsize), np.uint8) if zstd else values.reshape(count, out.itemsize)
    for i, plane in enumerate(values.reshape(out.itemsize, count) if zstd else ()):
        stored[:, i] = plane
    stored = stored.view(f"<u{out.itemsize}")[:, 0]
    if gaps is None:
        out[:] = stored
        return
    end = used = 0  # elements of out before the current block, and stored elements
    for start in range(0, len(gaps), _BLOCK):
        block = gaps[start : start + _BLOCK]
        ends = block != _SKIP  # gaps that end with an element
        index = np.cumsum(block + ends, dtype=np.intp)  # 254 + 1 fits in a byte
        index += end - 1
        end = int(index[-1]) + 1
        index = index if ends.all() else index[ends]
        if end > len(out) or used + len(index) > count:
            raise ValueError("the gaps have more elements than the shape or the values")
        out[index] = stored[used : used + len(index)]
        used += len(index)
    if used < count or len(out) - end >= _SKIP:
        raise ValueError("the gaps have fewer elements than the shape or the values")


def checksum(parts: Mapping[str, Bytes]) -> int:
    """Return the CRC-32 of the gaps, if there are any, followed by the values."""
    return zlib.crc32(parts["values"].data, zlib.crc32(parts["gaps"].data) if "gaps" in parts else 0)


def _gaps_and_values(elements: Elements, count: int) -> dict[str, Bytes]:
    """Return the gaps and values of an array with ``count`` elements that are not zero."""
    gaps: list[Bytes] = []
    values = np.empty(count, elements.dtype)
    done, trailing = 0, 0  # values so far, and zeros after the last one
    for start in range(0, len(elements), _BLOCK):
        block = elements[start : start + _BLOCK]
        index = np.flatnonzero(block)
        if not len(index):
            trailing += len(block)
            continue
        values[done : done + len(index)] = block[index]
        done += len(index)
        zeros = np.diff(index, prepend=-1) - 1
        zeros[0] += trailing
        skips = zeros // _SKIP
        coded = np.full(len(index) + int(skips.sum()), _SKIP, np.uint8)
        coded[np.cumsum(skips + 1) - 1] = zeros % _SKIP
        gaps.append(coded)
        trailing = len(block) - 1 - int(index[-1])
    gaps.append(np.full(trailing // _SKIP, _SKIP, np.uint8))
    return {"gaps": np.concatenate(gaps), "values": values.view(np.uint8)}


def _nbytes(parts: Mapping[str, Bytes]) -> int:
    return sum(content.size for content in parts.values())


def _compress(content: NDArray[Any]) -> Bytes:
    with errors_of_memory():
        return np.frombuffer(extra("zstandard").ZstdCompressor(level=_LEVEL).compress(content.tobytes()), np.uint8)


def _decompress(content: Bytes, limit: int) -> Bytes:
    """Return the content of a zstandard frame, of at most ``limit`` bytes."""
    library = extra("zstandard")
    data = content.data
    try:
        size = library.frame_content_size(data)
        if not 0 <= size <= limit:
            raise ValueError(f"a compressed part claims {size} bytes, more than the {limit} it may have")
        with errors_of_memory():
            expanded = library.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except library.ZstdError as error:
        raise ValueError(f"a compressed part is damaged: {error}") from error
    return np.frombuffer(expanded, np.uint8)

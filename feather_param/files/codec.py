"""Arrays without their zeros: the other elements, and the gaps between them. The format is `docs/sparse-files.md`."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feather_param.utils.extras import extra

Bytes = NDArray[np.uint8]
Elements = NDArray[Any]  # unsigned integers, one-dimensional; only whether all bits of one are 0 matters

LARGEST = 2048  # bytes that a stored byte may stand for, so that a small file takes little memory; a gap takes 255 * 8
_SKIP = 255  # a gap byte that stands for so many zeros and no element
_BLOCK = 1 << 16  # elements or gaps at a time, so that what is computed of them stays in the cache
_LEVEL = 12  # of zstandard: 19 saves 2 % more and takes five times as long


def pack(elements: Elements, zstd: bool) -> tuple[dict[str, Bytes], bool]:
    """Return the parts that stand for an array, and whether they are compressed.

    They are ``gaps`` and ``values``, or ``values`` alone where there are too few zeros to gain from. Compressed they
    are only where that makes them smaller, and not by more than a reader believes.
    """
    parts = {"values": elements.view(np.uint8)}
    count = int(np.count_nonzero(elements))
    if count * (elements.itemsize + 1) < elements.nbytes:
        sparse = _split(elements, count)
        if _size(sparse) < elements.nbytes:
            parts = sparse
    if not zstd:
        return parts, False
    planes = {**parts, "values": parts["values"].reshape(-1, elements.itemsize).T}
    packed = {part: _compress(content) for part, content in planes.items()}
    if _size(packed) < _size(parts) and elements.nbytes <= LARGEST * _size(packed):
        return packed, True
    return parts, False


def unpack(parts: Mapping[str, Bytes], zstd: bool, out: Elements) -> None:
    """Write the array that parts stand for into zeros of its size.

    Raises:
        ValueError: they do not fit. Nothing was written past the end, and little more memory taken than out has.
    """
    values, gaps = parts["values"], parts.get("gaps")
    if zstd:
        gaps = None if gaps is None else _expand(gaps, len(out))
        values = _expand(values, out.nbytes)
    count, rest = divmod(len(values), out.itemsize)
    if rest or (gaps is None and count != len(out)):
        raise ValueError(f"there are {len(values)} bytes of values, for {len(out)} elements of {out.itemsize} bytes")
    stored = np.empty((count, out.itemsize), np.uint8) if zstd else values.reshape(count, out.itemsize)
    for i, plane in enumerate(values.reshape(out.itemsize, count) if zstd else ()):
        stored[:, i] = plane
    stored = stored.view(f"<u{out.itemsize}")[:, 0]
    if gaps is None:
        out[:] = stored
        return
    end = taken = 0  # of out and of stored
    for start in range(0, len(gaps), _BLOCK):
        block = gaps[start : start + _BLOCK]
        ends = block != _SKIP
        index = np.cumsum(block + ends, dtype=np.intp)  # 254 + 1 fits in a byte
        index += end - 1
        end = int(index[-1]) + 1
        index = index if ends.all() else index[ends]
        if end > len(out) or taken + len(index) > count:
            raise ValueError("the gaps stand for more elements than the shape or the values have")
        out[index] = stored[taken : taken + len(index)]
        taken += len(index)
    if taken < count or len(out) - end >= _SKIP:
        raise ValueError("the gaps stand for fewer elements than the shape or the values have")


def crc(parts: Mapping[str, Bytes]) -> int:
    """Return the CRC-32 of the gaps, if there are any, and then the values."""
    return zlib.crc32(parts["values"].data, zlib.crc32(parts["gaps"].data) if "gaps" in parts else 0)


def _split(elements: Elements, count: int) -> dict[str, Bytes]:
    gaps: list[Bytes] = []
    values = np.empty(count, elements.dtype)
    taken, open_ = 0, 0  # open_: zeros behind the last element
    for start in range(0, len(elements), _BLOCK):
        block = elements[start : start + _BLOCK]
        index = np.flatnonzero(block)
        if not len(index):
            open_ += len(block)
            continue
        values[taken : taken + len(index)] = block[index]
        taken += len(index)
        zeros = np.diff(index, prepend=-1) - 1
        zeros[0] += open_
        skips = zeros // _SKIP
        coded = np.full(len(index) + int(skips.sum()), _SKIP, np.uint8)
        coded[np.cumsum(skips + 1) - 1] = zeros % _SKIP
        gaps.append(coded)
        open_ = len(block) - 1 - int(index[-1])
    gaps.append(np.full(open_ // _SKIP, _SKIP, np.uint8))
    return {"gaps": np.concatenate(gaps), "values": values.view(np.uint8)}


def _size(parts: Mapping[str, Bytes]) -> int:
    return sum(content.size for content in parts.values())


def _compress(content: NDArray[Any]) -> Bytes:
    return np.frombuffer(extra("zstandard").ZstdCompressor(level=_LEVEL).compress(content.tobytes()), np.uint8)


def _expand(content: Bytes, most: int) -> Bytes:
    library = extra("zstandard")
    data = content.data
    try:
        size = library.frame_content_size(data)
        if not 0 <= size <= most:
            raise ValueError(f"a compressed part claims {size} bytes, more than the {most} it may have")
        expanded = library.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except library.ZstdError as error:
        raise ValueError(f"a compressed part is damaged: {error}") from error
    return np.frombuffer(expanded, np.uint8)

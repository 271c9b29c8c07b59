"""A slow reader of sparse files, written from docs/sparse-files.md alone. It uses numpy and reads gap by gap."""

from __future__ import annotations

import json
import math
import struct
import zlib
from typing import Any

import numpy as np

__all__ = ["SIZES", "Refused", "parts_of", "read"]

SIZES = {  # bytes of an element, from the documentation
    **dict.fromkeys(["bool", "uint8", "int8", "float4_e2m1fn_x2", "bits8", "bits1x8", "bits2x4", "bits4x2"], 1),
    **{f"float8_{kind}": 1 for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")},
    **{f"{sign}int{n}": 1 for sign in ("", "u") for n in range(1, 8)},
    **dict.fromkeys(["float16", "bfloat16", "int16", "uint16", "bits16", "complex32", "bcomplex32"], 2),
    **dict.fromkeys(["float32", "int32", "uint32", "complex64"], 4),
    **dict.fromkeys(["float64", "int64", "uint64", "complex128"], 8),
}


class Refused(Exception):
    pass


def must(condition: object) -> None:
    if not condition:
        raise Refused


def read(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """Return dtype, shape and bytes of each tensor; raise `Refused` for what the documentation says to refuse."""
    try:
        outer, data = parts_of(content)
        text = outer.pop("__metadata__")["feather_param sparse"]
        must(outer["crc"] == str(zlib.crc32(text.encode())))
        header = _json(text)
        must(type(header["version"]) is int and header["version"] == 1 and set(header) == {"version", "tensors"})
        result: dict[str, Any] = {}
        described: set[str] = set()
        for name, entry in header["tensors"].items():
            name.encode()  # raises UnicodeEncodeError for a lone surrogate
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


def parts_of(content: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    (length,) = struct.unpack("<Q", content[:8])
    must(length <= min(len(content) - 8, 10**8))
    outer = _json(content[8 : 8 + length].decode())
    json.dumps(outer, ensure_ascii=False).encode()  # raises UnicodeEncodeError for a lone surrogate
    metadata = outer.pop("__metadata__")
    must(all(type(value) is str for value in metadata.values()))
    end, data = 0, {}
    for name, part in sorted(outer.items(), key=lambda item: item[1]["data_offsets"]):
        must(len(part["data_offsets"]) == 2)
        (begin, stop), (n,) = part["data_offsets"], part["shape"]
        must(part["dtype"] == "U8" and {type(begin), type(stop), type(n)} == {int})
        must(begin == end and stop - begin == n >= 0)
        data[name], end = content[8 + length :][begin:stop], stop
    must(end == len(content) - 8 - length)
    return {"__metadata__": metadata, "crc": metadata["feather_param crc32"]}, data


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once, parse_int=_integer)


def _integer(text: str) -> int:
    must(len(text) <= 20 and text != "-0")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    must(len(dict(pairs)) == len(pairs))
    return dict(pairs)


def _tensor(entry: dict[str, Any], gaps: bytes | None, values: bytes) -> bytes:
    must(type(entry["shape"]) is list and all(type(n) is int and 0 <= n < 2**63 for n in entry["shape"]))
    must(len(entry["shape"]) <= 64)
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

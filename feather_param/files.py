"""Checkpoint files that are really smaller: zeros are not stored. The format is `docs/sparse-files.md`."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from feather_param.selection import sparsified
from feather_param.verbs import baked_state_dict

__all__ = ["load_sparse", "save_sparse"]

Bytes = NDArray[np.uint8]

_KEY = "feather_param sparse"
_VERSION = 1
_SKIP = 255  # a gap byte that stands for so many zeros and no value
_MOST_ELEMENTS_A_BYTE = 4096  # of stored gaps: what a file may make a reader allocate
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128),
    )
}


@dataclass(frozen=True)
class _Entry:
    """What the file's header says of one tensor."""

    dtype: str
    shape: list[int]
    nonzeros: int | None  # None: stored as it is
    zstd: bool
    crc32: int

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=object))


def save_sparse(source: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str], *, zstd: bool = False) -> None:
    """Save a model or a state_dict without its zeros.

    Tensors with enough zeros are stored as their other elements and the gaps between them, one byte each; the rest as
    they are; tied tensors once. Bit by bit the same comes back, -0.0 and NaN included. The file is written under
    another name first, so that ``path`` holds the old content or the new.

    Args:
        source: a model (of a sparsified one, what `baked_state_dict` gives is saved) or a state_dict.
        path: the file; it is in the safetensors format.
        zstd: compress with zstandard as well.

    Raises:
        TypeError: an entry of the state_dict is no tensor, or of a dtype that cannot be stored.
        ImportError: safetensors (or zstandard) is not installed: ``pip install feather_param[files]``.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_sparse({"w": torch.eye(100)}, path)
        >>> torch.equal(load_sparse(path)["w"], torch.eye(100)), path.stat().st_size < 1500
        (True, True)
    """
    from feather_param.extras import safetensors_torch

    if isinstance(source, nn.Module):
        source = baked_state_dict(source) if sparsified(source) else source.state_dict()
    stored: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in source.items():
        dtype = str(getattr(tensor, "dtype", "")).removeprefix("torch.")
        if not isinstance(tensor, Tensor) or dtype not in _DTYPES or tensor.layout != torch.strided:
            raise TypeError(f"expected dense tensors of plain dtypes, got {_kind(tensor)} at {name}; leave it out")
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), dtype)
        if tensor.numel() and place in first:
            tied[name] = first[place]
            continue
        first[place] = name
        entry, parts = _encode(name, tensor.detach().cpu(), dtype, zstd)
        entries[name] = asdict(entry)
        stored.update({f"{part}:{name}": torch.from_numpy(content) for part, content in parts.items()})
    header = json.dumps({"version": _VERSION, "tensors": entries, "tied": tied}, separators=(",", ":"))
    content = safetensors_torch().save(stored, {_KEY: header})
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def load_sparse(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Load what `save_sparse` saved: a state_dict of dense tensors on the CPU.

    Nothing in the file is executed, and no more memory is taken than the file's size allows for.

    Raises:
        ValueError: the file is damaged, or another one; the message tells where.
        FileNotFoundError: there is none.
        ImportError: safetensors (or zstandard) is not installed: ``pip install feather_param[files]``.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_sparse(nn.Linear(2, 1), path)
        >>> {name: tuple(tensor.shape) for name, tensor in load_sparse(path).items()}
        {'weight': (1, 2), 'bias': (1,)}
    """
    from feather_param.extras import safetensors_torch

    content = Path(path).read_bytes()
    try:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_KEY])
        version = header["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"expected a file of save_sparse, got {path}, which is damaged or another one") from error
    if version != _VERSION:
        raise ValueError(
            f"expected a sparse file of version {_VERSION}, got {version} in {path}; "
            "load it with the feather_param release that wrote it"
        )
    try:
        stored = {name: tensor.numpy() for name, tensor in safetensors_torch().load(content).items()}
        tensors = {name: _decode(name, _Entry(**entry), stored) for name, entry in header["tensors"].items()}
        tensors.update({name: tensors[other] for name, other in header["tied"].items()})
    except ImportError:
        raise
    except Exception as error:  # whatever a damaged file makes of json, safetensors, zstandard and numpy
        raise ValueError(f"expected a whole file of save_sparse, got {path}, which is damaged: {error}") from error
    return tensors


def _kind(value: object) -> str:
    return f"a {value.layout} tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _bits(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor's elements as unsigned integers of their size (pairs of them where there is none so large)."""
    size = tensor.element_size()
    raw = tensor.contiguous().reshape(-1)
    raw = torch.view_as_real(raw).reshape(-1) if raw.is_complex() else raw
    content = raw.view(torch.uint8).numpy() if raw.numel() else np.empty(0, np.uint8)
    return content.view(f"u{size}") if size <= 8 else content.view("u8").reshape(-1, 2)


def _encode(name: str, tensor: Tensor, dtype: str, zstd: bool) -> tuple[_Entry, dict[str, Bytes]]:
    bits = _bits(tensor)
    raw = bits.view(np.uint8).reshape(-1)
    index = np.flatnonzero(bits if bits.ndim == 1 else bits.any(axis=1))
    gaps = _gaps(index, len(bits))
    sparse = len(gaps) + len(index) * tensor.element_size() < raw.size
    values = bits[index].reshape(-1).view(np.uint8) if sparse else raw
    parts = {"gaps": gaps, "values": values} if sparse else {"values": values}
    shrunk = False
    if zstd:
        from feather_param.extras import zstandard

        planes = {**parts, "values": _planes(values, tensor.element_size())}
        packed = {
            part: np.frombuffer(zstandard().ZstdCompressor(level=12).compress(content.tobytes()), np.uint8).copy()
            for part, content in planes.items()
        }
        smaller = sum(map(len, packed.values())) < sum(map(len, parts.values()))
        bounded = len(bits) <= _MOST_ELEMENTS_A_BYTE * min(map(len, packed.values()))
        if smaller and bounded:
            parts, shrunk = packed, True
    entry = _Entry(dtype, list(tensor.shape), len(index) if sparse else None, shrunk, 0)
    return _Entry(**{**asdict(entry), "crc32": _crc(name, entry, parts)}), parts


def _decode(name: str, entry: _Entry, stored: Mapping[str, NDArray[Any]]) -> Tensor:
    dtype = _DTYPES[entry.dtype]
    size = torch.empty((), dtype=dtype).element_size()
    sparse = entry.nonzeros is not None
    parts = {part: stored[f"{part}:{name}"] for part in (("gaps", "values") if sparse else ("values",))}
    if any(content.dtype != np.uint8 or content.ndim != 1 for content in parts.values()):
        raise ValueError(f"{name} is not stored as bytes")
    if not all(isinstance(n, int) and n >= 0 for n in [*entry.shape, entry.nonzeros or 0]):
        raise ValueError(f"{name} has a shape of {entry.shape}")
    if _crc(name, entry, parts) != entry.crc32:
        raise ValueError(f"the checksum of {name} is wrong")
    numel = entry.numel
    count = entry.nonzeros if entry.nonzeros is not None else numel
    if numel > _MOST_ELEMENTS_A_BYTE * (
        min(map(len, parts.values())) if entry.zstd else len(parts.get("gaps", parts["values"])) + 1
    ):
        raise ValueError(f"{name} claims {numel} elements, more than so few bytes can hold")
    if entry.zstd:
        limits = {"gaps": numel, "values": count * size}
        parts = {part: _expand(content, limits[part]) for part, content in parts.items()}
        parts["values"] = _unplanes(parts["values"], size)
    if len(parts["values"]) != count * size:
        raise ValueError(f"{name} has {len(parts['values'])} bytes of values, not {count * size}")
    width = f"u{size}" if size <= 8 else "u8"
    bits = np.zeros((numel, 2) if size > 8 else numel, width)
    values = parts["values"].view(width).reshape(-1, *bits.shape[1:])
    if sparse:
        bits[_index(name, parts["gaps"], count, numel)] = values
    else:
        bits[:] = values
    raw = torch.from_numpy(bits.reshape(-1).view(np.uint8))
    if numel == 0:
        return torch.empty(entry.shape, dtype=dtype)
    if dtype.is_complex:
        real = raw.view(torch.float32 if dtype == torch.complex64 else torch.float64)
        return torch.view_as_complex(real.reshape(-1, 2)).reshape(entry.shape)
    return raw.view(dtype).reshape(entry.shape)


def _gaps(index: NDArray[np.intp], numel: int) -> Bytes:
    """Return the zeros before each element as bytes, `_SKIP` for every 255 of them; and those behind the last."""
    if not len(index):
        return np.full(numel // _SKIP, _SKIP, np.uint8)
    gaps = np.diff(index, prepend=-1) - 1
    skips = gaps // _SKIP
    tail = (numel - 1 - int(index[-1])) // _SKIP
    out = np.full(len(index) + int(skips.sum()) + tail, _SKIP, np.uint8)
    out[np.cumsum(skips + 1) - 1] = gaps % _SKIP
    return out


def _index(name: str, gaps: Bytes, count: int, numel: int) -> NDArray[np.int64]:
    """Return the positions that gaps stand for."""
    ends = gaps != _SKIP
    after = np.cumsum(gaps + ends, dtype=np.int64) if len(gaps) else np.zeros(0, np.int64)  # 254 + 1 fits in a byte
    covered = int(after[-1]) if len(after) else 0
    index = after[ends] - 1
    if len(index) != count or not 0 <= numel - covered < _SKIP:
        raise ValueError(f"the gaps of {name} do not fit its shape")
    return index


def _planes(content: Bytes, size: int) -> Bytes:
    """Return first bytes first: exponents, which repeat, apart from mantissas, which do not."""
    return np.ascontiguousarray(content.reshape(-1, size).T).reshape(-1)


def _unplanes(content: Bytes, size: int) -> Bytes:
    return np.ascontiguousarray(content.reshape(size, -1).T).reshape(-1)


def _expand(content: Bytes, most: int) -> Bytes:
    from feather_param.extras import zstandard

    data = content.tobytes()
    if zstandard().frame_content_size(data) not in range(most + 1):
        raise ValueError("a compressed part is larger than it may be")
    return np.frombuffer(zstandard().ZstdDecompressor().decompress(data, max_output_size=most), np.uint8)


def _crc(name: str, entry: _Entry, parts: Mapping[str, NDArray[Any]]) -> int:
    crc = zlib.crc32(repr((name, entry.dtype, entry.shape, entry.nonzeros, entry.zstd)).encode())
    for part in sorted(parts):
        crc = zlib.crc32(memoryview(np.ascontiguousarray(parts[part])), crc)  # type: ignore[arg-type]
    return crc

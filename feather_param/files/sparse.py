"""Sparse files: write tensors without their zeros, and read them. `docs/sparse-files.md` specifies the format."""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.parameter import is_lazy

from feather_param.files.atomic import atomic_write
from feather_param.files.codec import MAX_DIMENSIONS, MAX_EXPANSION, Bytes, checksum, decode, encode
from feather_param.files.elements import elements_of, has_memory
from feather_param.files.safetensors import container_of, open_container, parse_json
from feather_param.files.tied import first_names
from feather_param.ops.distributed import is_sharded
from feather_param.utils.text import printable

SPARSE = "feather_param sparse"  # keys of a file's metadata
_CRC = "feather_param crc32"
_VERSION = 1
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, which UTF-8 cannot encode
_ALIGNMENT = 64  # bytes, as in torch's own allocator
# Every dtype except the quantised ones, whose scales are not part of their elements.
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith("torch.q")
}


@dataclass(frozen=True)
class _Entry:
    """The description of a tensor in a file, the names of its parts, and its slice of the memory."""

    dtype: torch.dtype
    shape: list[int]
    zstd: bool
    crc32: int
    parts: list[str]
    memory: slice


def write_sparse(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    zstd: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to a sparse file, and further metadata. `feather_param.save_sparse` describes it and its errors.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "eye.safetensors"
        >>> write_sparse({"w": torch.eye(100)}, path)
        >>> torch.equal(load_sparse(path)["w"], torch.eye(100)), path.stat().st_size < 1500
        (True, True)
    """
    content = sparse_content(tensors, zstd, metadata)
    with atomic_write(Path(path)) as file:
        file.writelines(content)


def sparse_content(
    tensors: Mapping[str, Tensor], zstd: bool, metadata: Mapping[str, str] | None = None
) -> list[memoryview | bytes]:
    """Return the content of a sparse file, in pieces.

    Args:
        tensors: the tensors by name.
        zstd: whether to compress with zstandard as well.
        metadata: further strings, which `load_sparse` ignores.

    Example:
        >>> sum(map(len, sparse_content({"w": torch.eye(100)}, zstd=False))) < 1500
        True
    """
    state = dict(tensors.items())  # keeps all tensors alive, as `first_names` requires
    for name, tensor in state.items():
        _check(name, tensor)
    entries: dict[str, Any] = first_names(state)
    parts: dict[str, Bytes] = {}
    for name in [name for name, first in entries.items() if name == first]:
        own, compressed = encode(elements_of(state[name]), zstd)
        dtype, shape = str(state[name].dtype).removeprefix("torch."), list(state[name].shape)
        entries[name] = {"dtype": dtype, "shape": shape, "zstd": compressed, "crc32": checksum(own)}
        parts.update({f"{part}:{name}": content for part, content in own.items()})
    text = json.dumps({"version": _VERSION, "tensors": entries}, separators=(",", ":"))
    return container_of({SPARSE: text, _CRC: str(zlib.crc32(text.encode())), **(metadata or {})}, parts)


def load_sparse(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Load a file of `save_sparse` as a state_dict of dense tensors on the CPU.

    No code in the file is executed. A tensor takes at most 2048 times as many bytes as it has in the file. All tensors
    share one block of memory, which is freed with the last of them. Clone a tensor to keep it alone.

    Raises:
        TypeError: ``path`` is not a path.
        ValueError: the file is damaged, or is not a sparse file. The message names the damage, or the function that
            loads the file.
        OSError: the file cannot be read.
        ImportError: the file is compressed and zstandard is not installed: ``pip install feather_param[files]``.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> feather_param.save_sparse(nn.Linear(2, 1), path)
        >>> {name: tuple(tensor.shape) for name, tensor in load_sparse(path).items()}
        {'weight': (1, 2), 'bias': (1,)}
    """
    if not isinstance(path, str | os.PathLike):  # open() takes an int as a file descriptor
        raise TypeError(f"expected a path, got {type(path).__name__}")
    other, shown = "which is damaged or another one", printable(path)
    try:
        container = open_container(path)
        metadata = container.metadata() or {}
        if SPARSE not in metadata and container.keys():
            other = "a safetensors file of another program; load it with safetensors.torch.load_file(path)"
        text = metadata[SPARSE]
        header = parse_json(text)
        version = header["version"]
        if type(version) is not int:
            raise ValueError("the version is not an int")
    except (ValueError, KeyError, RecursionError) as error:
        if os.path.isfile(path) and zipfile.is_zipfile(path):
            other = "a zip file, as torch.save writes; load it with torch.load(path, weights_only=True)"
        elif isinstance(error, ValueError):
            other += f" ({printable(error)})"
        raise ValueError(f"expected a file of save_sparse, got {shown}, {other}") from error
    if version != _VERSION:
        raise ValueError(
            f"expected a sparse file of version {_VERSION}, got {version} in {shown}; "
            "load it with the feather_param release that wrote it"
        )
    try:
        if metadata.get(_CRC) != str(zlib.crc32(text.encode())):
            raise ValueError("the checksum of the header is wrong")
        if header.keys() != {"version", "tensors"}:
            raise ValueError("a key of the header is missing or unknown")
        return _read(container, header["tensors"])
    except (ValueError, RecursionError) as error:  # str() of a deeply nested value raises RecursionError
        damage = printable(error)  # begins with a name
        raise ValueError(f"expected a whole file of save_sparse, got {shown}, which is damaged: {damage}") from error


def _check(name: object, tensor: object) -> None:
    """Raise a TypeError or ValueError if a tensor cannot be stored."""
    if not isinstance(name, str):
        raise TypeError(f"expected names to be strings, got {printable(repr(name))}; rename it")
    shown = printable(name)
    if _SURROGATE.search(name):
        raise ValueError(f"expected names of Unicode characters, got the lone surrogate in {shown}; rename it")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected dense tensors of plain dtypes, got {type(tensor).__name__} at {shown}; leave it out")
    if is_lazy(tensor):
        raise TypeError(f"expected tensors with content, got a lazy parameter at {shown}; run the model once before")
    if is_sharded(tensor):
        raise TypeError(
            f"expected whole tensors, got one sharded over processes at {shown}; "
            "call full_tensor() in all of them, or baked_state_dict(model), and save in one"
        )
    if tensor.layout != torch.strided or tensor.dtype not in _DTYPES.values():
        raise TypeError(
            f"expected dense tensors of plain dtypes, got a {tensor.layout} tensor of {tensor.dtype} at {shown}; "
            "leave it out"
        )
    if not has_memory(tensor):
        raise TypeError(f"expected tensors with content, got one without memory on {tensor.device} at {shown}; load it")
    if tensor.dim() > MAX_DIMENSIONS:
        raise ValueError(f"expected at most {MAX_DIMENSIONS} dimensions, got {tensor.dim()} at {shown}; reshape it")


def _read(container: Any, tensors: Any) -> dict[str, Tensor]:
    """Return the tensors of an open file."""
    sizes: dict[str, int] = {}
    for part in container.keys():  # noqa: SIM118 # a container is not a dict
        content = container.get_slice(part)
        if content.get_dtype() != "U8" or len(content.get_shape()) != 1:
            raise ValueError(f"{part} is not stored as bytes")
        (sizes[part],) = content.get_shape()
    entries, names = _entries(tensors, sizes)
    size = max((entry.memory.stop for entry in entries.values()), default=0)
    memory = np.zeros(size + _ALIGNMENT, np.uint8)  # one block, because fresh memory pages dominate the loading time
    memory = memory[-memory.ctypes.data % _ALIGNMENT :]
    loaded: dict[str, Tensor] = {}
    for name, entry in entries.items():
        raw = memory[entry.memory]
        try:
            parts = {part: container.get_tensor(f"{part}:{name}") for part in entry.parts}
            if checksum(parts) != entry.crc32:
                raise ValueError("the checksum is wrong")
            width = entry.dtype.itemsize // (2 if entry.dtype.is_complex else 1)  # a complex number is two elements
            decode(parts, entry.zstd, raw.view(f"u{width}"))
            loaded[name] = torch.from_numpy(raw).view(entry.dtype).reshape(entry.shape)
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"{name}: {error}") from error
    return {name: loaded[described] for name, described in names.items()}


def _entries(tensors: Any, sizes: dict[str, int]) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Return the entry of each described tensor, and for every name the name of its entry.

    Args:
        tensors: the object ``tensors`` of the file's header.
        sizes: the bytes of each part.
    """
    if type(tensors) is not dict:
        raise ValueError("the header has no tensors")
    entries: dict[str, _Entry] = {}
    names: dict[str, str] = {}
    begin = used = 0
    for name, raw in tensors.items():
        if _SURROGATE.search(name):
            raise ValueError(f"the name {name} has a lone surrogate")
        names[name] = name
        if type(raw) is str and raw in entries:
            names[name] = raw
            continue
        if type(raw) is not dict or raw.keys() != {"dtype", "shape", "zstd", "crc32"}:
            raise ValueError(f"{name} is described by {printable(raw, 80)}")
        dtype, shape = raw["dtype"], raw["shape"]
        if type(dtype) is not str or dtype not in _DTYPES:
            raise ValueError(
                f"{name} is of dtype {printable(dtype, 80)}, which torch {torch.__version__} does not have"
            )
        if type(shape) is list and len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"{name} has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
        if type(shape) is not list or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
            raise ValueError(f"{name} has the shape {printable(shape, 80)}")
        if type(raw["zstd"]) is not bool or type(raw["crc32"]) is not int:
            raise ValueError(f"{name} is described by {printable(raw, 80)}")
        own = [part for part in ("gaps", "values") if f"{part}:{name}" in sizes]
        if "values" not in own:
            raise ValueError(f"{name} has no values")
        used += len(own)
        stored = sum(sizes[f"{part}:{name}"] for part in own)
        end = begin + _nbytes(name, [_DTYPES[dtype].itemsize, *shape], MAX_EXPANSION * (stored + 1))
        entries[name] = _Entry(_DTYPES[dtype], shape, raw["zstd"], raw["crc32"], own, slice(begin, end))
        begin = end + -end % _ALIGNMENT
    if used != len(sizes):
        raise ValueError("it has parts that belong to no tensor")
    return entries, names


def _nbytes(name: str, sizes: list[int], limit: int) -> int:
    """Return the product of sizes. Raise a ValueError if it is too large.

    Args:
        name: name of the tensor.
        sizes: bytes of a number, and the shape.
        limit: the largest product.
    """
    empty = 0 in sizes
    limit = 2**63 - 1 if empty else limit  # torch's own limit, which counts empty tensors too
    product = math.prod(n or 1 for n in sizes)
    if product > limit:
        raise ValueError(f"{name} claims more than the {limit} bytes that its parts in the file may expand to")
    return 0 if empty else product

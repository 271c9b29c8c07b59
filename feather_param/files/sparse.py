"""Checkpoint files that are really smaller: zeros are not stored. The format is `docs/sparse-files.md`."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from feather_param.api import baked_state_dict
from feather_param.core.state_dict import of_sparsified
from feather_param.files.atomic import replacing
from feather_param.files.codec import LARGEST, Bytes, crc, pack, unpack
from feather_param.files.safetensors import opened, parse, write
from feather_param.ops.distributed import is_sharded
from feather_param.parametrizations import states_of
from feather_param.utils.warn import warn

SPARSE = "feather_param sparse"  # entries of a file's metadata
_CRC = "feather_param crc32"
_VERSION = 1
_ALIGNMENT = 64  # bytes, as torch's own allocator does
# Every dtype but the quantised ones, whose scales are not in their elements.
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith("torch.q")
}
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Entry:
    """What a file says of one tensor, which parts it has, and its place in memory."""

    dtype: torch.dtype
    shape: list[int]
    zstd: bool
    crc32: int
    parts: list[str]
    memory: slice


def save_sparse(source: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str], *, zstd: bool = False) -> None:
    """Save a model or a state_dict without its zeros.

    Tensors with enough zeros are stored as their other elements and the gaps between them, one byte each; the rest as
    they are; tied tensors once. Bit by bit the same comes back, -0.0 and NaN included. The file is written under
    another name first, so that ``path`` holds the old content or the new, also when several processes write.

    Args:
        source: a model (of a sparsified one, what `baked_state_dict` gives is saved) or a state_dict.
        path: the file; it is in the safetensors format.
        zstd: compress with zstandard as well.

    Raises:
        TypeError: the source is neither, or an entry of it is no tensor, or one that cannot be stored: quantised, of
            another layout than strided, without content (meta, lazy) or sharded.
        ValueError: ``path`` is a folder, a device or a pipe.
        FileNotFoundError: its folder is not there.
        ImportError: zstandard is not installed: ``pip install feather_param[files]``.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_sparse({"w": torch.eye(100)}, path)
        >>> torch.equal(load_sparse(path)["w"], torch.eye(100)), path.stat().st_size < 1500
        (True, True)
    """
    if not isinstance(source, nn.Module | Mapping):
        raise TypeError(f"expected a model or a state_dict, got {type(source).__name__}")
    if isinstance(source, nn.Module):
        source = baked_state_dict(source) if states_of(source) else source.state_dict()
    state = dict(source.items())  # holds all tensors at once: their addresses tell which are tied
    for name, tensor in state.items():
        _check(name, tensor)
    if of_sparsified(state):
        warn(
            "expected baked weights, got the state_dict of a sparsified model, whose zeros are not in it yet: it is "
            "saved dense; to save the zeros, pass the model, or baked_state_dict(model)"
        )
    tensors: dict[str, Any] = first_names(state)
    parts: dict[str, Bytes] = {}
    for name in [name for name, first in tensors.items() if name == first]:
        own, shrunk = pack(_elements(state[name]), zstd)
        dtype, shape = str(state[name].dtype).removeprefix("torch."), list(state[name].shape)
        tensors[name] = {"dtype": dtype, "shape": shape, "zstd": shrunk, "crc32": crc(own)}
        parts.update({f"{part}:{name}": content for part, content in own.items()})
    text = json.dumps({"version": _VERSION, "tensors": tensors}, separators=(",", ":"))
    with replacing(Path(path)) as file:
        write(file, {SPARSE: text, _CRC: str(zlib.crc32(text.encode()))}, parts)


def load_sparse(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Load what `save_sparse` saved: a state_dict of dense tensors on the CPU.

    Nothing in the file is executed, and no tensor is made that is larger than 2048 times what the file holds of it.
    The tensors lie in one block of memory, which is there as long as any of them: clone the one that outlives the rest.

    Raises:
        TypeError: the path is none.
        ValueError: the file is damaged, or another one; the message tells where, or what to load it with.
        OSError: it cannot be read.
        ImportError: zstandard is not installed: ``pip install feather_param[files]``.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_sparse(nn.Linear(2, 1), path)
        >>> {name: tuple(tensor.shape) for name, tensor in load_sparse(path).items()}
        {'weight': (1, 2), 'bias': (1,)}
    """
    if not isinstance(path, str | os.PathLike):  # open would take a number for a file that is open already
        raise TypeError(f"expected a path, got {type(path).__name__}")
    other = "which is damaged or another one"
    try:
        container = opened(path)
        metadata = container.metadata() or {}
        if SPARSE not in metadata and container.keys():
            other = "a safetensors file of another program; load it with safetensors.torch.load_file(path)"
        text = metadata[SPARSE]
        header = parse(text)
        version = header["version"]
        if type(version) is not int:
            raise ValueError("the version is no number")
    except (ValueError, KeyError, RecursionError) as error:
        if os.path.isfile(path) and zipfile.is_zipfile(path):
            other = "a zip file, as torch.save writes; load it with torch.load(path, weights_only=True)"
        elif isinstance(error, ValueError):
            other += f" ({error})"
        raise ValueError(f"expected a file of save_sparse, got {path}, {other}") from error
    if version != _VERSION:
        raise ValueError(
            f"expected a sparse file of version {_VERSION}, got {version} in {path}; "
            "load it with the feather_param release that wrote it"
        )
    try:
        if metadata.get(_CRC) != str(zlib.crc32(text.encode())):
            raise ValueError("the checksum of the header is wrong")
        return _read(container, header.get("tensors"))
    except (ValueError, RecursionError) as error:  # the latter of showing something deep
        raise ValueError(f"expected a whole file of save_sparse, got {path}, which is damaged: {error}") from error


def _check(name: object, tensor: object) -> None:
    """Raise a TypeError for what cannot be stored."""
    if not isinstance(name, str) or any("\ud800" <= character <= "\udfff" for character in name):
        raise TypeError(f"expected names to be strings of Unicode, got {name!r}; rename it")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected dense tensors of plain dtypes, got {type(tensor).__name__} at {name}; leave it out")
    if is_lazy(tensor):
        raise TypeError(f"expected tensors with content, got a lazy parameter at {name}; run the model once before")
    if is_sharded(tensor):
        raise TypeError(
            f"expected whole tensors, got one sharded over processes at {name}; "
            "call full_tensor() in all of them, or baked_state_dict(model), and save in one"
        )
    if tensor.layout != torch.strided or tensor.dtype not in _DTYPES.values():
        raise TypeError(
            f"expected dense tensors of plain dtypes, got a {tensor.layout} tensor of {tensor.dtype} at {name}; "
            "leave it out"
        )
    if not _has_memory(tensor):
        raise TypeError(f"expected tensors with content, got one on {tensor.device} without at {name}; load it first")


def _has_memory(tensor: Tensor) -> bool:
    try:
        return not tensor.is_meta and (not tensor.numel() or tensor.untyped_storage().data_ptr() != 0)
    except RuntimeError:  # torch has no other way of telling it
        return False


def first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for each name the first one of the same tensor.

    Example:
        >>> weight = torch.ones(2)
        >>> first_names({"embedding": weight, "head": weight, "other": torch.ones(2)})
        {'embedding': 'embedding', 'head': 'embedding', 'other': 'other'}
    """
    first: dict[Any, str] = {}
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        view = (tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, *view) if tensor.numel() else name
        found[name] = first.setdefault(place, name)
    return found


def _elements(tensor: Tensor) -> NDArray[Any]:
    """Return the bits of a tensor's elements in row-major order as little-endian unsigned integers."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    width = tensor.element_size()
    bits = tensor.view(_SAME_SIZE[width]).contiguous().reshape(-1).numpy()
    return bits.view(f"u{width}").astype(f"<u{width}", copy=False)


def _read(container: Any, tensors: Any) -> dict[str, Tensor]:
    """Return the tensors of a file."""
    sizes: dict[str, int] = {}
    for part in container.keys():  # noqa: SIM118 # it is no dict
        content = container.get_slice(part)
        if content.get_dtype() != "U8" or len(content.get_shape()) != 1:
            raise ValueError(f"{part} is not stored as bytes")
        (sizes[part],) = content.get_shape()
    entries, names = _entries(tensors, sizes)
    size = max((entry.memory.stop for entry in entries.values()), default=0)
    memory = np.zeros(size + _ALIGNMENT, np.uint8)  # one block: fresh pages are most of what loading costs
    memory = memory[-memory.ctypes.data % _ALIGNMENT :]
    loaded: dict[str, Tensor] = {}
    for name, entry in entries.items():
        raw = memory[entry.memory]
        try:
            parts = {part: container.get_tensor(f"{part}:{name}") for part in entry.parts}
            if crc(parts) != entry.crc32:
                raise ValueError("the checksum is wrong")
            width = entry.dtype.itemsize // (2 if entry.dtype.is_complex else 1)  # a complex number is two elements
            unpack(parts, entry.zstd, raw.view(f"u{width}"))
            loaded[name] = torch.from_numpy(raw).view(entry.dtype).reshape(entry.shape)
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"{name}: {error}") from error
    return {name: loaded[described] for name, described in names.items()}


def _entries(tensors: Any, sizes: dict[str, int]) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Return what a file has of each tensor that it describes, and for each name, the one it is described under."""
    if type(tensors) is not dict:
        raise ValueError("it tells of no tensors")
    entries: dict[str, _Entry] = {}
    names: dict[str, str] = {}
    begin = used = 0
    for name, raw in tensors.items():
        names[name] = name
        if type(raw) is str and raw in entries:
            names[name] = raw
            continue
        if type(raw) is not dict or raw.keys() != {"dtype", "shape", "zstd", "crc32"}:
            raise ValueError(f"{name} is described by {str(raw)[:80]}")
        dtype, shape = raw["dtype"], raw["shape"]
        if type(dtype) is not str or dtype not in _DTYPES:
            raise ValueError(f"{name} is of dtype {str(dtype)[:80]}, which torch {torch.__version__} does not have")
        if type(shape) is not list or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
            raise ValueError(f"{name} has the shape {str(shape)[:80]}")
        if type(raw["zstd"]) is not bool or type(raw["crc32"]) is not int:
            raise ValueError(f"{name} is described by {str(raw)[:80]}")
        own = [part for part in ("gaps", "values") if f"{part}:{name}" in sizes]
        if "values" not in own:
            raise ValueError(f"{name} has no values")
        used += len(own)
        stored = sum(sizes[f"{part}:{name}"] for part in own)
        end = begin + _nbytes(name, [_DTYPES[dtype].itemsize, *shape], LARGEST * (stored + 1))
        entries[name] = _Entry(_DTYPES[dtype], shape, raw["zstd"], raw["crc32"], own, slice(begin, end))
        begin = end + -end % _ALIGNMENT
    if used != len(sizes):
        raise ValueError("it has parts that belong to no tensor")
    return entries, names


def _nbytes(name: str, sizes: list[int], most: int) -> int:
    """Return the product of some sizes; where it is too large, stop before it costs anything to compute."""
    empty = 0 in sizes
    most = 2**63 - 1 if empty else most  # which torch can count
    product = 1
    for n in sizes:
        product *= n or 1
        if product > most:
            raise ValueError(f"{name} claims more than the {most} bytes that so small a part of a file may stand for")
    return 0 if empty else product

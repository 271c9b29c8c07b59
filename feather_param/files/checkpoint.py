"""Read the tensors of a checkpoint file of any common kind, without running code in it."""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from feather_param.files.codec import MAX_DIMENSIONS, MAX_EXPANSION
from feather_param.files.elements import has_memory
from feather_param.files.errors import errors_of_memory
from feather_param.files.safetensors import open_container
from feather_param.files.sparse import SPARSE, load_sparse
from feather_param.files.tied import untied
from feather_param.files.torch_pickle import check
from feather_param.utils.text import printable

_COMMON_KEYS = ("state_dict", "model_state_dict", "model")
_LONGEST = 1000  # characters of a key that a message proposes


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file."""

    kind: str  # "torch", "safetensors" or "sparse"
    tensors: dict[str, Tensor]  # the dense tensors by name, on the CPU
    others: dict[str, str] = field(default_factory=dict)  # descriptions of the other entries, by name
    key: str = ""  # location of the tensors in the file, names joined by dots; empty if they are the whole file
    beside: tuple[str, ...] = ()  # names of the other entries of the file


def read(path: Path, key: str | None = None) -> Checkpoint:
    """Read a file of ``torch.save``, safetensors or `save_sparse`. The kind is found from the content.

    A torch file is read with ``weights_only=True``. If it is not a state_dict itself, its entries ``state_dict``,
    ``model_state_dict`` and ``model`` are tried.

    All tensors together take at most 2048 bytes for each byte of the file, as dense tensors; tied tensors count once.
    So a small file of expanded tensors cannot take much memory. A tensor has at most 64 dimensions.

    Args:
        path: the file.
        key: location of the state_dict in a torch file, names joined by dots (``"training.model"``).

    Raises:
        ValueError: the file is damaged, is of another kind, contains objects that could run code, expands to more than
            2048 times its size, or has no state_dict at this location.
        OSError: the file cannot be read.
        MemoryError: there is too little memory.
        ImportError: a library that the file needs is not installed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "run.pt"
        >>> torch.save({"epoch": 3, "model": nn.Linear(2, 1).state_dict()}, path)
        >>> found = read(path)
        >>> found.kind, found.key, list(found.tensors), found.beside
        ('torch', 'model', ['weight', 'bias'], ('epoch',))
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # opening a pipe may wait for ever
        raise ValueError(f"expected {path} to be a file, got a device or pipe; write its content to a file")
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        return _read_safetensors(path, key)
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"):
        return _checkpoint(_load_torch(path), path, key)
    what = "one of another kind" if start else "an empty one"
    what = "JSON; if it is an index of several files, each of these is a checkpoint" if start[:1] == b"{" else what
    raise ValueError(f"expected {path} to be a file of torch, safetensors or save_sparse, got {what}")


def _read_safetensors(path: Path, key: str | None) -> Checkpoint:
    if key:
        raise ValueError(f"expected no key for {path}: a safetensors file holds one set of tensors")
    try:
        with errors_of_memory():
            sparse = SPARSE in (open_container(path).metadata() or {})
            tensors = {} if sparse else load_file(path, backend="pread")
    except (OSError, MemoryError):
        raise
    except Exception as error:  # SafetensorError, or an error of torch for a dtype that it does not have
        raise ValueError(
            f"expected a safetensors file, got {path}, which is damaged: {_sentence(str(error))}"
        ) from error
    return Checkpoint("sparse", load_sparse(path)) if sparse else _checkpoint(tensors, path, None, "safetensors")


def _load_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings(), errors_of_memory():
            warnings.simplefilter("ignore")  # about old formats and tensor kinds, which the user cannot change
            check(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = _unsafe(path, str(error))
        if not unsafe:
            raise ValueError(f"expected a file of torch.save, got {path}, another pickle or a damaged one") from error
        raise ValueError(
            f"expected tensors and plain values in {path}, got {', '.join(unsafe)}: loading these can run any code, so "
            "it was not done; where you trust the file, load it yourself and save the state_dict alone"
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises many types for damaged files and for those of other programs
        if "TorchScript" in str(error):
            raise ValueError(
                f"expected tensors in {path}, got a TorchScript program; "
                "torch.jit.load it yourself where you trust it, and save its state_dict"
            ) from error
        raise ValueError(
            f"expected a file of torch.save, got {path}, which is damaged or something else: {_sentence(str(error))}"
        ) from error


def _sentence(message: str) -> str:
    """Return the first sentence of a message of torch, without the location in torch's source code."""
    line = re.sub(r"^\[enforce fail at [^]]*\][ .]*", "", message.strip().partition("\n")[0])
    return printable(line.partition(". ")[0].rstrip("."), 200)


def _unsafe(path: Path, message: str) -> list[str]:
    """Return the names of the objects that a pickle would import."""
    named = re.findall(r"GLOBAL ([\w.]+)", message)[:1]
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path) or named
    except Exception:  # it supports fewer kinds of files than torch.load
        return named


def _checkpoint(content: Any, path: Path, key: str | None, kind: str = "torch") -> Checkpoint:
    """Return the state_dict in the content of a file."""
    names = _names_in(key, content, path) if key else _common_key(content)
    beside: list[str] = []
    state = content
    for depth, name in enumerate(names):
        beside += [".".join([*names[:depth], _name(other)]) for other in state if other != name]
        state = state[name]
    if not _has_tensors(state):
        places = sorted(_places(content).items(), key=lambda place: -place[1])[:5]
        listed = ", ".join(f"{place} ({count} tensors)" for place, count in places)
        hint = f"choose one of these with --key: {listed}" if places else "it holds none"
        raise ValueError(f"expected a state_dict at {key or 'the top'} of {path}, got {_kind(state)}; {hint}")
    others = {_name(name): _kind(value) for name, value in dict.items(state) if not _is_dense(value)}
    dense: dict[str, Tensor] = {}
    for name, value in dict.items(state):
        if _is_dense(value):
            if _name(name) in dense:  # the keys 1 and "1", for example
                raise ValueError(f"expected a name for each tensor of {path}, got {_name(name)} twice; rename one")
            dense[_name(name)] = Tensor.detach(value)
    _require_bounded(dense, path)
    return Checkpoint(kind, dense, others, ".".join(names), tuple(beside))


def _require_bounded(tensors: Mapping[str, Tensor], path: Path) -> None:
    limit = MAX_EXPANSION * path.stat().st_size
    total = 0
    for name, tensor in untied(tensors).items():
        if tensor.dim() > MAX_DIMENSIONS:
            raise ValueError(
                f"expected at most {MAX_DIMENSIONS} dimensions, got {tensor.dim()} of {name} in {path}; reshape it"
            )
        total += math.prod(tensor.shape) * tensor.element_size()  # tensor.nbytes overflows
        if total > limit:
            raise ValueError(
                f"expected the tensors of {path} to expand to at most {limit} bytes, {MAX_EXPANSION} for each byte of "
                f"the file, got {total} with {name}; save contiguous tensors"
            )


def _common_key(content: Any) -> list[str]:
    if isinstance(content, dict):
        for name in _COMMON_KEYS:
            if _has_tensors(dict.get(content, name)):
                return [name]
    return []


def _names_in(key: str, content: Any, path: Path) -> list[str]:
    """Return the names in a key. A name may contain dots itself."""
    if not isinstance(content, dict):
        raise ValueError(f"expected {key} in {path}, got {_kind(content)} with nothing in it")
    if key in content:
        return [key]
    for name in content:
        if isinstance(name, str) and key.startswith(f"{name}.") and isinstance(content[name], dict):
            return [name, *_names_in(key.removeprefix(f"{name}."), content[name], path)]
    raise ValueError(f"expected {key} in {path}, got {', '.join(map(_name, list(content)[:10])) or 'nothing'}")


def _places(content: Any) -> dict[str, int]:
    """Return the keys of the dicts that hold tensors, with the number of these. Each dict counts once."""
    found: dict[str, int] = {}
    seen = set()  # a dict may hold itself
    waiting = deque([("", content)])
    while waiting:
        key, value = waiting.popleft()
        if not isinstance(value, dict) or id(value) in seen or len(key) > _LONGEST:
            continue
        seen.add(id(value))
        if key and _has_tensors(value):
            found[key] = sum(isinstance(item, Tensor) for item in dict.values(value))
        prefix = f"{key}." if key else ""
        waiting += ((prefix + name, item) for name, item in dict.items(value) if isinstance(name, str))
    return found


def _has_tensors(value: Any) -> bool:
    # A file may give an OrderedDict or a tensor attributes with the names of its methods. Then value.values() fails.
    return isinstance(value, dict) and any(isinstance(item, Tensor) for item in dict.values(value))


def _name(name: object) -> str:
    """Return the text of a dict key, which may be long or fail for a tensor."""
    return str(name) if isinstance(name, str | int | float | bytes | None) else type(name).__name__


def _is_dense(value: Any) -> bool:
    plain = isinstance(value, Tensor) and value.layout == torch.strided
    return plain and not (value.is_quantized or value.is_nested) and has_memory(Tensor.detach(value))


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    for kind, is_kind in {"quantized": value.is_quantized, "meta": value.is_meta, "nested": value.is_nested}.items():
        if is_kind:
            return f"{kind} tensor"
    if value.layout != torch.strided:
        return f"{str(value.layout).removeprefix('torch.')} tensor"
    return "tensor" if _is_dense(value) else "tensor without memory"

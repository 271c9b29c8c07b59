"""Check what the pickles of a torch file would build, before torch builds it.

``torch.load(weights_only=True)`` runs no code of a file, but trusts its numbers: a pickle of 40 bytes can ask for
``bytearray(2**33)`` or for a dict key that takes hours to hash. `check` follows the opcodes of a pickle with stand-ins
for the values. It needs memory in proportion to the file.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from feather_param.files.codec import MAX_DIMENSIONS, MAX_EXPANSION

_WALKS, _FREE = 8, 800_000  # items that the calls of a pickle may look at: for each byte, and further ones (0.1 s)
_DEPTH = 100  # of the arguments of a call, and of a key
_CODECS = ((), ("latin1",), ("latin-1",))  # the arguments after a text
_CONSTANTS = {"NONE", "NEWFALSE", "NEWTRUE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_CONSTANTS.add("SHORT_BINSTRING")
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MODULES = ("torch", "collections", "builtins", "__builtin__", "_codecs")
_SIMPLE = ("collections", "builtins", "__builtin__")  # each call takes memory and time in proportion to its arguments
_PACKED = {"QUInt4x2Storage": 2, "QUInt2x4Storage": 4}  # numbers in a byte


@dataclass(frozen=True)
class _Global:
    module: str
    name: str


@dataclass(frozen=True)
class _Storage:
    nbytes: int
    itemsize: int
    packed: int = 1  # numbers in an item


@dataclass
class _Tensor:
    nbytes: int  # if it were dense


def check(path: Path) -> None:
    """Raise an error if `torch.load` of a file would take memory or time out of proportion to the file.

    Storages, and the tensors that are computed from others, may take `MAX_EXPANSION` bytes for each byte of the file.
    The calls of a pickle may look at 800,000 items, and at 8 more for each byte of the pickle.

    Raises:
        ValueError: the file claims more, is damaged, or calls a function as no `torch.save` does.
        pickle.UnpicklingError: `torch.load` refuses the pickle, or it calls a class of torch that is no tensor.
        RuntimeError: the file is no zip file of torch.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "run.pt"
        >>> torch.save({"weight": torch.zeros(3), "bytes": bytearray(2)}, path)
        >>> check(path)
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
        file.seek(0)
        if not zipped:
            machine = _Machine(size, size)
            *_, keys = [machine.read(file) for _ in range(5)]  # after magic number, protocol, system, content
            if not all(isinstance(key, str) for key in keys):
                raise ValueError("storages with keys that are no strings")
            return
        archive: Any = torch._C.PyTorchFileReader(file)
        if "constants.pkl" in archive.get_all_records():  # TorchScript, which torch.load refuses
            return
        _at_most("data.pkl", _record_size(archive, "data.pkl"), size)
        content = io.BytesIO(archive.get_record("data.pkl"))
        _Machine(MAX_EXPANSION * size, size, lambda key: _record_size(archive, f"data/{key}")).read(content)


def _record_size(archive: Any, name: str) -> int:
    if hasattr(archive, "get_record_size"):
        return archive.get_record_size(name)
    return len(archive.get_record(name))  # torch 2.6


class _Machine:
    """A stack machine for the opcodes that ``torch.load(weights_only=True)`` accepts.

    Values are numbers, strings, tuples, lists (also for dicts and sets), and the classes above.

    Args:
        storages: most bytes of all storages.
        size: bytes of the file.
        stored: returns the bytes that the file has for a storage, by its key; None if no directory lists them.
    """

    def __init__(self, storages: int, size: int, stored: Callable[[str], int] | None = None) -> None:
        self._most = {"storages": storages, "copies of tensors": MAX_EXPANSION * size}
        self._used = dict.fromkeys(self._most, 0)
        self._stored = stored
        self._storages: dict[str, _Storage] = {}
        self._walked = self._may_walk = 0

    def read(self, file: BinaryIO | io.BytesIO) -> Any:
        """Follow one pickle, from the position of a file up to its end. Return the stand-in for its value."""
        try:
            return self._follow(pickletools.genops(file))
        except (LookupError, TypeError, AttributeError, MemoryError) as error:
            # Values of other kinds than the opcodes expect, or a length of 2^62 bytes.
            raise ValueError("a damaged pickle") from error

    def _follow(self, opcodes: Any) -> Any:
        self._stack: list[Any] = []
        marks: list[list[Any]] = []
        memo: dict[int, Any] = {}
        for opcode, argument, position in opcodes:
            self._may_walk = _WALKS * position + _FREE
            match opcode.name:
                case "PROTO":
                    pass
                case "STOP":
                    return self._stack.pop()
                case name if name in _CONSTANTS:
                    self._stack.append(argument)
                case "BINGET" | "LONG_BINGET":
                    self._stack.append(memo[argument])
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = self._stack[-1]
                case "GLOBAL":
                    self._stack.append(_global(argument))
                case "MARK":
                    marks.append(self._stack)
                    self._stack = []
                case "TUPLE" | "APPENDS" | "SETITEMS" as name:
                    items, self._stack = self._stack, marks.pop()
                    self._add(name, items)
                case name if name in _TUPLES:
                    items = self._pop(_TUPLES[name])
                    self._stack.append(tuple(items))
                case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                    self._stack.append([])
                case "APPEND" | "SETITEM" as name:
                    self._add(f"{name}S", self._pop(1 + (name == "SETITEM")))
                case "REDUCE" | "NEWOBJ":
                    self._stack.append(self._call(*self._pop(2)))
                case "BUILD":
                    self._build(*self._pop(2))
                case "BINPERSID":
                    self._stack.append(self._storage(*self._pop(1)))
                case name:
                    raise pickle.UnpicklingError(f"unsupported opcode {name}")
        raise ValueError("a pickle without an end")

    def _pop(self, count: int) -> Any:
        start = len(self._stack) - count
        if start < 0:
            raise ValueError("a pickle with an empty stack")
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _add(self, opcode: str, items: list[Any]) -> None:
        if opcode == "TUPLE":
            self._stack.append(tuple(items))
            return
        for key in items[::2] if opcode == "SETITEMS" else ():
            if type(key) is tuple:  # it is hashed
                self._walk(key)
        self._stack[-1].extend(items)

    def _call(self, function: Any, arguments: Any) -> Any:
        """Return the stand-in for the result of a call."""
        if type(function) is not _Global or type(arguments) is not tuple:
            raise ValueError("a call that torch.save does not write")
        name = function.name
        first = arguments[0] if arguments else None
        if name in ("_rebuild_from_type_v2", "_rebuild_parameter_with_state"):
            result = first if isinstance(first, _Tensor) else self._call(first, arguments[2])
            return self._set_attributes(result, arguments[3])
        nbytes = self._walk(arguments)
        if name in ("encode", "bytearray"):
            if arguments and not (isinstance(first, str) and arguments[1:] in _CODECS):
                raise ValueError(f"a call of {name} that torch.save does not write")
            return first or ""
        if name.startswith("_rebuild") or name == "Parameter":
            return self._tensor(name, arguments, nbytes)
        if name.endswith(("Tensor", "Storage")):
            if arguments:
                raise ValueError(f"a call of {name} that torch.save does not write")
            return _Tensor(0)
        if function.module not in _SIMPLE and name not in ("Size", "device", "_get_layout"):
            raise pickle.UnpicklingError(f"GLOBAL {function.module}.{name}")
        if any(isinstance(argument, _Tensor | _Storage) for argument in arguments):
            raise ValueError(f"a call of {name} that torch.save does not write")
        return list(arguments) if name in ("OrderedDict", "Counter", "set") else arguments

    def _tensor(self, name: str, arguments: tuple[Any, ...], nbytes: int) -> _Tensor:
        """Return the stand-in for the tensor that a function of torch returns.

        Args:
            name: the function.
            arguments: its arguments.
            nbytes: bytes of the tensors among them, if they were dense.
        """
        if isinstance(arguments[0], _Tensor) and "arameter" in name:
            return arguments[0]
        if name == "_rebuild_device_tensor_from_cpu_tensor":
            nbytes *= torch.complex128.itemsize  # it may convert bytes to this type
        self._use("copies of tensors", nbytes)
        if isinstance(arguments[0], _Storage):
            storage, offset, shape, strides = arguments[:4]
            itemsize = getattr(torch, arguments[6].name).itemsize if name == "_rebuild_tensor_v3" else storage.itemsize
            nbytes = _nbytes(storage, offset, shape, strides, itemsize)
            if name == "_rebuild_qtensor":  # it makes an empty tensor first
                self._use("copies of tensors", nbytes)
        return _Tensor(nbytes)

    def _build(self, target: Any, state: Any) -> None:
        if not isinstance(target, _Tensor):
            self._set_attributes(target, state)
        # As torch 0.1 saved tensors and Parameters. Other tensors may be represented by the same object.
        elif type(state) is tuple and len(state) == 4 and isinstance(state[0], _Storage):
            storage, offset, shape, strides = state
            target.nbytes = max(target.nbytes, _nbytes(storage, offset, shape, strides, storage.itemsize))
        elif type(state) is tuple and len(state) == 5 and isinstance(state[0], _Tensor):
            target.nbytes = max(target.nbytes, state[0].nbytes)
        else:
            raise ValueError("a state of a tensor that torch.save does not write")
        self._stack.append(target)

    def _set_attributes(self, target: Any, state: Any) -> Any:
        """Set the attributes in a dict, or in a tuple of two. torch does not look into their values."""
        nbytes = self._walk(state, 3 if type(state) is tuple else 2)
        if isinstance(target, _Tensor):
            target.nbytes = max(target.nbytes, nbytes)  # the attribute "data" replaces the elements
        return target

    def _storage(self, identity: Any) -> _Storage:
        """Return the storage with a persistent id of torch.save."""
        match identity:
            case ("storage", _Global(name=name), str(key), str(), int(count), *views):
                pass
            case ("module", _Global(module, name), *_):  # a whole model
                raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
            case _:
                raise pickle.UnpicklingError("a persistent id of another kind")
        itemsize = 1 if name == "UntypedStorage" else torch.serialization.StorageType(name).dtype.itemsize
        if key not in self._storages:
            claimed = count * itemsize
            nbytes = self._stored(key) if self._stored else claimed  # a file may have bytes after the last item
            if not 0 <= claimed <= nbytes:
                raise ValueError(f"a storage of {claimed} bytes that takes {nbytes} in the file")
            self._use("storages", nbytes)
            self._storages[key] = _Storage(nbytes, itemsize, _PACKED.get(name, 1))
        storage = self._storages[key]
        match views:
            case [] | [None]:
                return storage
            case [(str(view), int(offset), int(count))] if 0 <= offset <= offset + count <= storage.nbytes // itemsize:
                return self._storages.setdefault(view, _Storage(count * itemsize, itemsize))
        raise ValueError("a storage past the end of another one")

    def _use(self, what: str, nbytes: int) -> None:
        self._used[what] += nbytes
        _at_most(what, self._used[what], self._most[what])

    def _walk(self, value: Any, depth: int = _DEPTH) -> int:
        """Count the items of nested tuples and lists, each as often as it is met. Return the bytes of their tensors."""
        level, nbytes = [(value,)], 0
        for _ in range(depth):
            self._count(sum(map(len, level)))
            items = [item for each in level for item in each]
            self._count(sum(len(item) for item in items if type(item) is str))
            nbytes += sum(item.nbytes for item in items if type(item) is _Tensor)
            level = [item for item in items if type(item) in (tuple, list)]
            if not level:
                break
        if level and depth == _DEPTH:
            raise ValueError("a pickle with values that are nested too deeply")
        return nbytes

    def _count(self, items: int) -> None:
        self._walked += items
        if self._walked > self._may_walk:
            raise ValueError("a pickle that repeats its values many times")


def _global(argument: str) -> _Global:
    module, _, name = argument.partition(" ")
    if module.partition(".")[0] not in _MODULES:
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
    return _Global(module, name)


def _nbytes(storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> int:
    """Return the bytes of a dense copy of a tensor in a storage."""
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"expected at most {MAX_DIMENSIONS} dimensions, got {len(shape)}")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if min((offset, *shape, *strides)) < 0 or (
        0 not in shape and (last + 1) * itemsize > storage.nbytes * storage.packed
    ):
        raise ValueError("a tensor past the end of its storage")
    return math.prod(shape) * itemsize


def _at_most(what: str, nbytes: int, most: int) -> None:
    if nbytes > most:
        raise ValueError(f"expected {what} of at most {most} bytes, got {nbytes}")

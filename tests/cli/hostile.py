"""Torch and safetensors files with hostile changes, and a process that gives many of them to the command line.

``python -m tests.cli.hostile SEED CASES`` runs cases until one of them fails.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import feather_param

ODD = [0, 1, 2, 3, 4, 7, 16, 64, 65, 255, 256, 1000, 2**15, 2**20, 2**31, 2**33, 2**40, 2**62, 2**63 - 1, 2**63, 2**64]
ODD += [-n for n in (1, 2, 4, 2**31, 2**63)] + [10**200]
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "I64", "U16", "BOOL"]
GLOBALS = [
    *(f"collections {name}" for name in ("OrderedDict", "Counter")),
    *(f"builtins {name}" for name in ("set", "bytearray", "complex")),
    *(f"torch._utils _rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3", "qtensor", "sparse_tensor")),
    *(f"torch._utils _rebuild_{name}" for name in ("parameter", "nested_tensor", "wrapper_subclass")),
    *(f"torch._utils _rebuild_{name}" for name in ("meta_tensor_no_storage", "device_tensor_from_cpu_tensor")),
    *(f"torch {name}Storage" for name in ("Float", "Double", "Half", "BFloat16", "Byte", "ComplexFloat", "QInt8")),
    *(f"torch {name}" for name in ("Size", "Tensor", "FloatTensor", "device", "float32", "float64", "complex32")),
    *(f"torch {name}" for name in ("int64", "bits8", "uint7", "float8_e5m2", "per_tensor_affine")),
    *("_codecs encode", "torch.serialization _get_layout", "torch.storage UntypedStorage"),
    *("torch.nn.parameter Parameter", "torch._tensor _rebuild_from_type_v2", "UserDict Counter", "os system"),
]
PLAIN = b"NRb\x85\x86\x87aesu0(t])}\x8f\x81Q.q\x01h\x01"  # opcodes; the two last have a byte of argument


def states() -> Iterator[tuple[str, dict[str, Any]]]:
    """Return state_dicts with values of each kind that torch saves, and one of a model in training."""
    torch.manual_seed(0)
    weight = torch.where(torch.rand(6, 4) < 0.5, torch.randn(6, 4), 0.0)
    plain = {"fc.weight": weight, "tied.weight": weight, "half": weight[:2].bfloat16(), "fc.bias": torch.zeros(6)}
    plain |= {"count": torch.tensor(3), "none": torch.zeros(0, 4), "view": weight.T[1:], "ids": weight[:1].expand(3, 4)}
    yield "plain", plain
    odd = {"conj": torch.randn(2, 2, dtype=torch.complex64).conj()}
    odd |= {
        "negative": torch.randn(2, dtype=torch.complex64).conj().imag,
        "parameter": nn.Parameter(weight.clone()),
        "bool": weight > 0,
    }
    odd |= {"float8": weight.to(torch.float8_e4m3fn), "uint16": torch.zeros(2, 2, dtype=torch.uint16)}
    yield "odd", odd
    others = {"weight": weight, "coo": weight.to_sparse(), "csr": weight.to_sparse_csr(), "bytes": b"\x00\xff"}
    others |= {"bytearray": bytearray(b"abc"), "set": {1, 2}, "complex": 1j, "size": weight.shape, "float": 0.5}
    others |= {"quantised": torch.quantize_per_tensor(weight, 0.1, 3, torch.qint8), "device": torch.device("cpu")}
    others |= {"dtype": torch.float16, "list": [weight, (1, 2)], "meta": weight.to("meta"), "nothing": None}
    yield "others", others
    yield "run", {"state_dict": OrderedDict(plain), "epoch": 3, "optimizer": {"state": {0: {"step": weight}}}}
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0)
    yield "training", dict(model.state_dict())


def saved(state: Mapping[str, Any], zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(dict(state), file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def damaged(content: bytes, generator: random.Random) -> bytes:
    """Return a file with changed, lost or added bytes, mostly near its beginning or its end."""
    changed = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 10])):
        where = int(len(changed) * generator.random() ** 2)
        where = generator.choice([where, len(changed) - 1 - where])
        match generator.randrange(4):
            case 0:
                changed[where : where + 1] = generator.randbytes(1)
            case 1:
                del changed[where : where + generator.randrange(1, 9)]
            case 2:
                changed[where:where] = generator.randbytes(generator.randrange(1, 9))
            case 3:
                changed = changed if generator.random() < 0.8 else changed[: where + 1]
    return bytes(changed)


def integer(n: int) -> bytes:
    """Return the opcode of an int."""
    data = pickle.encode_long(n)
    return b"\x8a" + bytes([len(data)]) + data


def text(string: str) -> bytes:
    """Return the opcode of a string."""
    data = string.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def named(name: str) -> bytes:
    """Return the opcode of a global, as "module name"."""
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def opcodes_of(content: bytes) -> list[bytes]:
    """Return the opcodes of a pickle, each with its argument."""
    positions = [position or 0 for _, _, position in pickletools.genops(content)]
    return [content[begin:end] for begin, end in zip(positions, [*positions[1:], len(content)], strict=True)]


def changed_pickle(content: bytes, generator: random.Random) -> bytes:
    """Return a pickle with other opcodes or arguments."""
    opcodes = opcodes_of(content)
    by_kind: dict[str, list[int]] = {"c": [], "K": [], "X": []}
    for i, opcode in enumerate(opcodes):
        by_kind.setdefault({"J": "K", "M": "K"}.get(chr(opcode[0]), chr(opcode[0])), []).append(i)
    plain = [PLAIN[i : i + 1] for i in range(len(PLAIN) - 4)] + [PLAIN[-4:-2], PLAIN[-2:]]
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        where = generator.randrange(2, len(opcodes))
        match generator.randrange(9):
            case 0 | 1 if by_kind["K"]:
                opcodes[generator.choice(by_kind["K"])] = integer(generator.choice(ODD))
            case 2 if by_kind["c"]:
                opcodes[generator.choice(by_kind["c"])] = named(generator.choice(GLOBALS))
            case 3 if by_kind["X"]:
                opcodes[generator.choice(by_kind["X"])] = opcodes[generator.choice(by_kind["X"])]
            case 4:
                opcodes[where] = generator.choice(plain)
            case 5:
                opcodes.insert(where, generator.choice([*plain, *opcodes, integer(generator.choice(ODD))]))
            case 6:
                del opcodes[where]
            case 7:
                call = named(generator.choice(GLOBALS)) + generator.choice([integer(generator.choice(ODD)), b"h\x01"])
                opcodes.insert(where, call + b"\x85" + generator.choice([b"R", b"\x81"]))
            case _:
                repeats = generator.choice([2, 30, 1000])
                opcodes.insert(where, generator.choice([b"q\x01h\x01\x86", b"\x85", b"q\x01]h\x01ah\x01a"]) * repeats)
    return b"".join(opcodes)


def changed_zip(content: bytes, generator: random.Random) -> bytes:
    """Return a torch file with another pickle or other records, and right checksums."""
    file = io.BytesIO()
    compression = generator.choice([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", compression) as new:
        kind = generator.randrange(10)
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl") and kind > 0:
                data = changed_pickle(data, generator)
            elif kind == 0 and generator.random() < 0.2:
                data = generator.choice([b"", b"big", data[:-1], data + data, generator.randbytes(len(data))])
            new.writestr(entry.filename, data)
    return file.getvalue()


def changed_legacy(content: bytes, generator: random.Random) -> bytes:
    """Return a torch file of the old format with another pickle of its content."""
    file = io.BytesIO(content)
    ends = []
    for _ in range(5):
        list(pickletools.genops(file))
        ends.append(file.tell())
    which = generator.choice([3, 3, 3, 4])
    begin, end = ends[which - 1], ends[which]
    return content[:begin] + changed_pickle(content[begin:end], generator) + content[end:]


def changed_safetensors(content: bytes, generator: random.Random) -> bytes:
    """Return a safetensors file with another header of the right length."""
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    name = generator.choice([name for name in header if name != "__metadata__"])
    entry: dict[str, Any] = header[name]
    for _ in range(generator.choice([1, 1, 2])):
        match generator.randrange(8):
            case 0:
                entry["dtype"] = generator.choice(DTYPES)
            case 1:
                entry["shape"] = [1] * generator.choice([0, 1, 63, 64, 65, 1000])
            case 2 | 3:
                entry["shape"] = generator.choices(ODD, k=generator.randrange(1, 4))
            case 4:
                entry["data_offsets"] = generator.choices([*ODD, len(data)], k=2)
            case 5:
                key = generator.choice(["dtype", "shape", "data_offsets"])
                entry[key] = generator.choice([None, {}, [], "F32", 1.5, -1, [[]]])
            case 6:
                header[generator.choice(["__metadata__", "", "a" * 1000, "\ud800", name + ".original"])] = entry
            case _:
                size = generator.choice([1, 2, 4, 8])
                entry.update(
                    dtype=f"{'IU'[size == 1]}{8 * size}", shape=[0, generator.choice(ODD)], data_offsets=[0, 0]
                )
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def originals() -> list[tuple[bytes, Any]]:
    """Return files, each with the function that changes its structure."""
    found: list[tuple[bytes, Any]] = []
    for name, state in states():
        found += [(saved(state, True), changed_zip), (saved(state, False), changed_legacy)]
        if name in ("plain", "training", "odd"):
            dense = {key: value.detach().resolve_conj().resolve_neg() for key, value in state.items()}
            copies: dict[str, Tensor] = {key: value.contiguous().clone() for key, value in dense.items()}
            found.append((safetensors.torch.save(copies), changed_safetensors))
    return found

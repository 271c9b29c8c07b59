"""Report a checkpoint file: the zeros of each weight, and its size in other formats."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from feather_param.core.state_dict import dense_beside_pruned, of_sparsified
from feather_param.files.checkpoint import Checkpoint
from feather_param.files.tied import untied
from feather_param.ops.count import PruneCount
from feather_param.reports.report import Report, rows
from feather_param.utils.text import aligned, listed, percent, printable

_ORIGINAL = ".original"  # a part of the names of weights with parametrizations


def counted(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the tensors that a report is about.

    These are all, except the dense weights of a model in training whose pruned weights are in the file as well.
    """
    left_out = dense_beside_pruned(checkpoint.tensors)
    return {name: tensor for name, tensor in checkpoint.tensors.items() if name not in left_out}


def zeros(checkpoint: Checkpoint) -> Report:
    """Count the zeros of the weights in a checkpoint.

    The weights are the floating-point tensors with two or more dimensions. Tied weights count once. The outputs of each
    are its first dimension, because a file does not say which layers are transposed convolutions or embeddings.

    Example:
        >>> checkpoint = Checkpoint("torch", {"weight": torch.eye(4), "bias": torch.zeros(4)})
        >>> print(as_text(Path("fc.pt"), 1234, checkpoint, zeros(checkpoint)))
        fc.pt: torch, 1,234 bytes, 2 tensors
        <BLANKLINE>
        weight  shape  total  zeros     rate  of all survivors  per output
        weight  4x4       16     12  75.000%           100.00%         1.0
        all               16     12  75.000%           100.00%         1.0
        and 1 other tensor (biases, norms, integers)
    """
    weights = {name: tensor for name, tensor in untied(counted(checkpoint)).items() if _is_weight(tensor)}
    counts = {name: PruneCount(_count(tensor)) for name, tensor in weights.items()}
    return Report(rows(weights, counts, outputs={name: len(tensor) for name, tensor in weights.items()}))


def _is_weight(tensor: Tensor) -> bool:
    # torch cannot compare float4. It packs two of them into an element.
    return tensor.is_floating_point() and tensor.dim() >= 2 and "float4" not in str(tensor.dtype)


def _count(tensor: Tensor) -> int:
    tensor = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no == on a CPU
    return int((tensor == 0).sum())


def in_training(checkpoint: Checkpoint) -> str:
    """Return a sentence if a checkpoint holds the dense weights of a model in training, else ""."""
    if not of_sparsified(checkpoint.tensors):
        return ""
    return (
        "the weights with parametrizations in their names are those of a model in training: its zeros are not in them "
        "yet; run feather-param bake, or save feather_param.baked_state_dict(model), or the state_dict after desparsify"
    )


def notes(checkpoint: Checkpoint) -> list[str]:
    """Return remarks on tensors that are not counted, not baked or larger than necessary."""
    found = []
    if twice := dense_beside_pruned(checkpoint.tensors):
        found.append(
            f"not counted, and not in the sizes: the dense weights of a model in training ({listed(sorted(twice))}), "
            "because their pruned weights are in the file as well"
        )
    if any(_ORIGINAL in name for name in counted(checkpoint)) and (note := in_training(checkpoint)):
        found.append(note)
    if checkpoint.others:
        kinds = listed([f"{name} ({kind})" for name, kind in checkpoint.others.items()])
        found.append(f"not counted, because they are no dense tensors: {kinds}")
    weights = [
        tensor for tensor in untied(counted(checkpoint)).values() if _is_weight(tensor) and tensor.element_size() > 1
    ]
    negative = sum(int(((tensor == 0) & tensor.signbit()).sum()) for tensor in weights)
    if negative:
        found.append(
            f"{negative:,} zeros are -0.0, for example from weight * mask; a sparse file stores -0.0 like any other "
            "value; weight + 0.0 turns them into 0.0"
        )
    return found


def as_text(
    path: Path, nbytes: int, checkpoint: Checkpoint, report: Report, sizes: Mapping[str, int] | None = None
) -> str:
    """Return the report as a table.

    Args:
        path: the file.
        nbytes: its size in bytes.
        checkpoint: its content, from `read`.
        report: its zeros, from `zeros`.
        sizes: its size in other formats, from `file_sizes`.
    """
    key = f" at {printable(checkpoint.key)}" if checkpoint.key else ""
    lines = [f"{printable(path)}: {checkpoint.kind}, {nbytes:,} bytes, {len(checkpoint.tensors)} tensors{key}"]
    if checkpoint.beside:
        lines.append(f"beside them: {listed(checkpoint.beside)}")
    lines += ["", str(report)]
    tensors = counted(checkpoint)
    tied = len(tensors) - len(untied(tensors))
    others = len(tensors) - tied - len(report.rows)
    if others:
        lines.append(f"and {others} other tensor{'s' * (others > 1)} (biases, norms, integers)")
    if tied:
        lines.append(f"and {tied} tied to one of these")
    if sizes:
        dense = max(1, sizes["dense"])
        cells = [(name, f"{size:,} bytes", percent(size / dense)) for name, size in sizes.items()]
        width = max(len(size) for _, size, _ in cells)
        lines += ["", *aligned([(name, size.rjust(width), part) for name, size, part in cells])]
    return "\n".join(lines)


def as_json(
    path: Path, nbytes: int, checkpoint: Checkpoint, report: Report, sizes: Mapping[str, int], notes: Sequence[str]
) -> str:
    """Return the report and the notes as JSON. `docs/feather-param-command.md` describes the fields."""
    counts = {row.name: row.zeros for row in report.rows}
    content: dict[str, Any] = {
        "file": str(path),
        "kind": checkpoint.kind,
        "bytes": nbytes,
        "key": checkpoint.key,
        "beside": list(checkpoint.beside),
        "total": report.total,
        "zeros": report.zeros,
        "rate": report.rate,
        "tensors": [
            {
                "name": name,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "total": tensor.numel(),
                "zeros": counts.get(name),  # null: no weight, tied to an earlier one, or not counted
            }
            for name, tensor in checkpoint.tensors.items()
        ],
        "others": checkpoint.others,
        "sizes": {name.replace(" + ", "_"): size for name, size in sizes.items()},
        "notes": list(notes),
    }
    return json.dumps(content, indent=2)

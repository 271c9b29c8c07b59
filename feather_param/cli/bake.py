"""Bake a checkpoint file: compute the plain weights with exact zeros without the model."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import Tensor

from feather_param.api import baked_state_dict
from feather_param.files.checkpoint import Checkpoint
from feather_param.utils.text import listed


def baked_tensors(path: Path, checkpoint: Checkpoint) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a plain model with exact zeros, and remarks on them.

    Args:
        path: the file, for messages.
        checkpoint: its content.

    Raises:
        ValueError: the file does not hold a state that can be baked; see `feather_param.baked_state_dict`.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> _ = feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0)
        >>> checkpoint = Checkpoint("torch", model.state_dict(), key="model", beside=("epoch",))
        >>> tensors, remarks = baked_tensors(Path("run.pt"), checkpoint)
        >>> list(tensors), remarks
        (['weight', 'bias'], ['OUT holds the weights only; run.pt also holds epoch'])
    """
    for name, kind in checkpoint.others.items():
        raise ValueError(f"{path}: expected tensors alone, got {kind} at {name}, which cannot be written; remove it")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            tensors = baked_state_dict(checkpoint.tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    remarks = [str(warning.message) for warning in caught]
    if checkpoint.beside:
        remarks.append(f"OUT holds the weights only; {path} also holds {listed(checkpoint.beside)}")
    return tensors, remarks

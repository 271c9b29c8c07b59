"""What stands in the state_dict of a sparsified model, and how a plain model's state loads into it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# The dense weights have the names that `torch.nn.utils.parametrize` gives them. One entry beside them holds the
# position, as four int64 numbers: a version, the number of zeros, the optimizer steps, and the step at which the masks
# were fixed, or -1. Thresholds and masks are not saved, for they follow from these and the weights.

_VERSION = 1
_ENTRY = ".shared._extra_state"


def pack_position(zeros: int, step: int, frozen_step: int | None) -> Tensor:
    """Return a position as a tensor of four integers."""
    return torch.tensor([_VERSION, zeros, step, -1 if frozen_step is None else frozen_step], device="cpu")


def unpack_position(state: Any, total: int) -> tuple[int, int, int | None]:
    """Return the number of zeros, the step and the frozen step that a tensor holds, of a model of so many weights.

    Raises:
        ValueError: it is no such tensor, or from another model or version.
    """
    numbers = isinstance(state, Tensor) and not state.is_floating_point() and state.shape == (4,)
    if not numbers:
        found = f"{state.dtype} of shape {tuple(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(
            f"expected the position of a sparsified model (*{_ENTRY}) to be 4 integers, got {found}; "
            "save the state_dict as it is, without casting the integers in it"
        )
    version, zeros, step, frozen = state.tolist()
    if version != _VERSION:
        raise ValueError(
            f"expected the state of a sparsified model in version {_VERSION}, got {version}; "
            "load it with the feather_param release that wrote it"
        )
    if not 0 <= zeros <= total or step < 0:
        raise ValueError(
            f"expected the state of this model, of which {total:,} weights are prunable, got one with {zeros:,} zeros "
            f"at step {step}; give sparsify the model and the settings of the run that saved it"
        )
    return zeros, step, None if frozen < 0 else frozen


def of_sparsified(names: Iterable[str]) -> bool:
    """Return whether these are the entries of a sparsified model's state_dict, whose weights are still dense."""
    return any("parametrizations." in name and name.endswith(_ENTRY) for name in names)


def accept_dense(state_dict: dict[str, Any], prefix: str, tensors: Iterable[str]) -> None:
    """Rename the plain layer's entries for some tensors to those of the sparsified one, where these are missing."""
    for tensor in tensors:
        original = f"{prefix}parametrizations.{tensor}.original"
        if prefix + tensor in state_dict and original not in state_dict:
            state_dict[original] = state_dict.pop(prefix + tensor)

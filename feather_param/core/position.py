"""The position of a model in its schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from feather_param.ops.groups import Group

_VERSION = 1  # of the saved tensor


@dataclass
class Position:
    """The position of a model in its schedule, and the thresholds at this position."""

    zeros: int = 0  # in all weights together
    step: int = 0  # optimizer steps seen
    frozen_step: int | None = None  # the step at which the masks were fixed
    groups: Sequence[Group] = ()  # the zeros of each group of weights, with its threshold

    @property
    def thresholds(self) -> dict[str, Tensor]:
        """The threshold of each weight, by name."""
        return {name: group.threshold for group in self.groups for name in group.names}

    @property
    def largest_threshold(self) -> Tensor:
        """The largest threshold, on the device of the first one; NaN if one of them is. It does not wait for a GPU."""
        first, *others = (group.threshold for group in self.groups if group.names)
        if not others:
            return first
        return torch.stack([first, *(threshold.to(first.device) for threshold in others)]).amax()

    def pack(self) -> Tensor:
        """Return the position as int64 [4]: version, zeros, step, and frozen step or -1. Thresholds are not saved."""
        frozen = -1 if self.frozen_step is None else self.frozen_step
        return torch.tensor([_VERSION, self.zeros, self.step, frozen], device="cpu")


def unpack(state: Any, total: int, entry: str) -> Position:
    """Return the position that a tensor holds, without thresholds.

    Args:
        state: what `Position.pack` returned.
        total: number of elements of all prunable weights of the model.
        entry: name of the tensor in the state_dict, for the message.

    Raises:
        ValueError: it is another kind of tensor, or of another model or version.
    """
    if not isinstance(state, Tensor) or state.is_floating_point() or state.shape != (4,):
        found = f"{state.dtype} of shape {tuple(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(
            f"expected the position of a sparsified model (*{entry}) to be 4 integers, got {found}; "
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
            f"expected the state of this model, which has {total:,} prunable weights, got one with {zeros:,} zeros "
            f"at step {step}; give sparsify the model and the settings of the run that saved it"
        )
    return Position(zeros, step, None if frozen < 0 else frozen)

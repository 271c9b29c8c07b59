"""The position of a model in its schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from feather_param.ops.groups import Group


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

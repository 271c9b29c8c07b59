"""NaN in weights on a GPU, noticed without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from feather_param.shards import held_here
from feather_param.thresholds import refuse_non_finite


class LateNaN:
    """A look at the threshold of the step before, which is NaN where a weight was not finite.

    It is copied to memory of the host that the GPU writes to when it gets there; the next steps read it there without
    waiting. Where the weights are sharded, all processes must raise at the same step, or those that go on would wait
    for the others for ever: so there a step waits for the copy of the step before, which has long been made.
    """

    def __init__(self) -> None:
        self._seen: Tensor | None = None
        self._written: torch.cuda.Event | None = None

    def refuse(self, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """Raise the ValueError that names the weights with NaN or infinity, if the threshold was seen to be NaN."""
        if self._seen is None:
            return
        if self._written is not None:
            self._written.synchronize()
        if math.isnan(self._seen):
            parts, add_up = held_here(weights())
            refuse_non_finite(parts, elsewhere=add_up is not None)

    def look(self, threshold: Tensor, sharded: bool) -> None:
        """Have a threshold copied; one on the CPU needs no watch, for there the step itself raises."""
        if threshold.device.type != "cuda":
            return
        if self._seen is None:
            self._seen = torch.zeros((), pin_memory=True)
        self._seen.copy_(threshold, non_blocking=True)
        if sharded:
            self._written = self._written or torch.cuda.Event()
            self._written.record()

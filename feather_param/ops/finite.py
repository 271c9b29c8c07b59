"""NaN and infinity in weights, and the error that names them; on a GPU without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from feather_param.ops.distributed import Sum, held_here


def require_finite(weights: Mapping[str, Tensor], add_up: Sum | None = None, new: bool = False) -> None:
    """Raise `refuse_non_finite`'s error if some weight holds NaN or infinity; all processes call this."""
    held = [weight.detach() for weight in weights.values() if not weight.is_meta]
    if not held:
        return
    bad = torch.stack([(~weight.isfinite()).sum().cpu() for weight in held]).sum()
    if add_up is not None:
        bad = add_up(bad.to(next(iter(weights.values())).device))
    if bad:
        refuse_non_finite(weights, elsewhere=add_up is not None, new=new)


def refuse_non_finite(weights: Mapping[str, Tensor], elsewhere: bool = False, new: bool = False) -> None:
    """Raise the error that names the weights with NaN or infinity, if any or some `elsewhere`; waits for the device.

    Args:
        weights: tensors by name.
        elsewhere: whether another process may hold them.
        new: whether these weights have yet to be trained, and no training can be to blame.
    """
    names = [name for name, weight in weights.items() if not weight.detach().isfinite().all()]
    if names or elsewhere:
        found = ", ".join(names) or "a part that another process holds"
        advice = (
            "check the initialisation, or the checkpoint that they come from"
            if new
            else "the training has diverged: go back to the last checkpoint and lower the learning rate, or clip the "
            "gradients"
        )
        raise ValueError(f"expected finite weights, got NaN or infinity in {found}; {advice}")


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

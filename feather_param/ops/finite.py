"""Checks for NaN and infinity in weights, and the error that names these weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from feather_param.ops.distributed import Sum, held_here
from feather_param.utils.text import listed


def require_finite(weights: Mapping[str, Tensor], add_up: Sum | None = None, new: bool = False) -> None:
    """Raise a ValueError if a weight holds NaN or infinity.

    It waits for the device. Weights on the meta device are skipped.

    Args:
        weights: tensors by name.
        add_up: as in `kth_magnitude`; then all processes must call this.
        new: as in `refuse_non_finite`.
    """
    held = [weight.detach() for weight in weights.values() if not weight.is_meta]
    if not held:
        return
    bad = torch.stack([(~weight.isfinite()).sum().cpu() for weight in held]).sum()
    if add_up is not None:
        bad = add_up(bad.to(next(iter(weights.values())).device))
    if bad:
        refuse_non_finite(weights, elsewhere=add_up is not None, new=new)


def refuse_non_finite(weights: Mapping[str, Tensor], elsewhere: bool = False, new: bool = False) -> None:
    """Raise a ValueError that names the weights with NaN or infinity; do nothing if all are finite.

    It waits for the device.

    Args:
        weights: tensors by name.
        elsewhere: raise even if all these weights are finite, because another process may hold the ones that are not.
        new: whether the weights have not been trained yet; the advice in the message depends on it.
    """
    names = [name for name, weight in weights.items() if not weight.detach().isfinite().all()]
    if names or elsewhere:
        found = listed(names) or "a part that another process holds"
        advice = (
            "check the initialisation, or the checkpoint that they come from"
            if new
            else "the training has diverged: go back to the last checkpoint and lower the learning rate, or clip the "
            "gradients"
        )
        raise ValueError(f"expected finite weights, got NaN or infinity in {found}; {advice}")


class LateNaN:
    """Find NaN and infinity in weights on a GPU without waiting for the GPU.

    The threshold is NaN if a weight was not finite. Each step starts a copy of it to host memory and does not wait.
    The next step usually finds it there. On a CPU there is nothing to do, because the step itself raises.

    If the weights are sharded, all processes must raise at the same step. Otherwise those that go on would wait for
    the others for ever. In this case a step waits for the copy of the step before, which has usually been made by then.
    """

    def __init__(self) -> None:
        self._seen: Tensor | None = None  # in pinned memory, which the GPU writes to
        self._written: torch.cuda.Event | None = None  # if the weights are sharded

    def refuse(self, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """Raise the error of `refuse_non_finite` if the copied threshold is NaN."""
        if self._seen is None:
            return
        if self._written is not None:
            self._written.synchronize()
        if math.isnan(self._seen):
            parts, add_up = held_here(weights())
            refuse_non_finite(parts, elsewhere=add_up is not None)

    def watch(self, threshold: Tensor, sharded: bool) -> None:
        """Start the copy of a threshold."""
        if threshold.device.type != "cuda":
            return
        if self._seen is None:
            self._seen = torch.zeros((), pin_memory=True)
        self._seen.copy_(threshold, non_blocking=True)
        if sharded:
            self._written = self._written or torch.cuda.Event()
            self._written.record()

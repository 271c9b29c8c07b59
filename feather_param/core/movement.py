"""A warning for a training that does not change the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from feather_param.core.shared import SharedSparsity
from feather_param.core.versions import Checksum, checksum_of
from feather_param.utils.warn import warn

_STEPS = 10


class Movement:
    """Warns once if no weight has changed in the first ten steps: then the optimizer does not hold them.

    On a GPU the result is copied to the host without waiting, and read ten steps later.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._checksums: list[Checksum] = []
        self._changed: Tensor | None = None  # 0-dim bool on the CPU

    def check(self, shared: SharedSparsity) -> None:
        """Count a step, and check the weights after the tenth. Sharded ones and those without gradient are skipped."""
        if self._steps > 2 * _STEPS or shared.sharded:
            return
        self._steps += 1
        if self._steps in (1, _STEPS + 1):
            trained = [each.originals for each in shared.registrations.values() if each.originals[0].requires_grad]
            before, self._checksums = self._checksums, [checksum_of(originals) for originals in trained]
            self._changed = _any_differs(before, self._checksums)
            if self._changed is not None and self._changed.is_pinned():
                return
        elif self._steps <= 2 * _STEPS:
            return
        if self._changed is not None and not self._changed:
            warn(
                f"none of the {len(self._checksums)} prunable weights has changed in {_STEPS} steps: the optimizer "
                "does not hold them; while sparsified, layer.weight is no Parameter, so build parameter groups from "
                "model.named_parameters(), or before sparsify"
            )
        self._changed = None


def _any_differs(before: list[Checksum], now: list[Checksum]) -> Tensor | None:
    """Return whether a checksum differs, on the CPU: pinned memory that a GPU writes later. None: cannot be told."""
    if not before or len(before) != len(now):
        return None
    pairs = [(a.total, b.total) for a, b in zip(before, now, strict=True) if a.dtype == b.dtype]
    found = [a != b.to(a.device) for a, b in pairs if a is not None and b is not None]
    if not found:
        return None
    differs = torch.stack([each.to(found[0].device) for each in found]).any()
    if differs.device.type != "cuda":
        return differs.cpu()
    return torch.ones((), dtype=torch.bool, pin_memory=True).copy_(differs, non_blocking=True)

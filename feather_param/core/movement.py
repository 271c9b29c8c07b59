"""A warning for a training that does not change the weights."""

from __future__ import annotations

from feather_param.core.shared import SharedSparsity
from feather_param.core.versions import Checksum, checksum_of
from feather_param.utils.warn import warn

_STEPS = 10


class Movement:
    """Warns once, after ten steps, if no weight has changed: then the optimizer does not hold them."""

    def __init__(self) -> None:
        self._steps = 0
        self._checksums: list[Checksum] = []

    def check(self, shared: SharedSparsity) -> None:
        """Count a step, and check the weights after the tenth. Sharded ones and those without gradient are skipped."""
        if self._steps > _STEPS or shared.sharded:
            return
        self._steps += 1
        if self._steps in (1, _STEPS + 1):
            trained = [each.originals for each in shared.registrations.values() if each.originals[0].requires_grad]
            before, self._checksums = self._checksums, [checksum_of(originals) for originals in trained]
            if before and len(before) == len(trained) and not any(map(Checksum.differs, before, self._checksums)):
                warn(
                    f"none of the {len(trained)} prunable weights has changed in {_STEPS} steps: the optimizer does "
                    "not hold them; while sparsified, layer.weight is no Parameter, so build parameter groups from "
                    "model.named_parameters(), or before sparsify"
                )

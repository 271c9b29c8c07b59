"""The warning that layers starve: they have fewer survivors than outputs, so some outputs have no input."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from feather_param.core.config import Config
from feather_param.core.shared import SharedSparsity
from feather_param.core.warnings import warn_of_dead, what_helps
from feather_param.ops.count import PruneCount
from feather_param.ops.tracing import concrete
from feather_param.utils.text import listed
from feather_param.utils.warn import warn

# When the survivors are counted: if their scheduled number has fallen by this fraction since the last count,
_FALL = 0.1
# and the schedule has made this fraction of its steps since then, or this number of steps,
_SCHEDULE, _STEPS = 0.1, 100
# or the training has made this fraction of its steps since then.
_TRAINING = 0.1
# Number of layers that a warning names.
_NAMED = 5


class Starvation:
    """Warns of each layer that starves, and of each weight without survivors, once, soon after it has happened.

    The survivors are counted when their scheduled number has fallen by a tenth since the last count, and at
    ``end_step``. Between two counts is at least a tenth of the schedule, or 100 steps if that is less. At a constant
    rate, there is a count in each tenth of the training. So a training has about fifteen counts, a long one up to 50.
    At less than half of the final zeros there are none: weights that were initialised to zero are pruned first, and may
    still grow.

    On a GPU, the counts are copied to the host without waiting, and read at a later step. Sharded weights are not
    counted, and nothing is counted while a CUDA graph is captured.
    """

    def __init__(self) -> None:
        self._starving: set[str] = set()  # names of the weights that a warning has named
        self._dead: set[str] = set()
        self._step = -math.inf  # at the last count
        self._kept = math.inf  # scheduled number of survivors at the last count
        self._counted: _Counted | None = None  # not read yet

    def check(self, shared: SharedSparsity) -> None:
        """Count the survivors if it is time to, and warn of the counts that have arrived."""
        if self._counted is None and self._is_due(shared) and _can_count(shared):
            position = shared.position
            self._step, self._kept = position.step, shared.budget.total - position.zeros
            self._counted = _Counted.start(shared)
        if self._counted is not None and self._counted.arrived:
            survivors, self._counted = self._counted.survivors, None
            self._warn_of_dead(shared, {name for name, count in survivors.items() if not count})
            self.warn(survivors, shared.outputs(), shared.config)

    def warn(self, survivors: Mapping[str, int], outputs: Mapping[str, int], config: Config) -> None:
        """Warn of the layers that starve, unless a warning has named them or nothing survives in them.

        Args:
            survivors: number of survivors of each weight, by name.
            outputs: number of its outputs.
            config: the settings, on which the advice depends.
        """
        found = [name for name, count in survivors.items() if 0 < count < outputs[name] and name not in self._starving]
        if not found:
            return
        advice = f"; what helps, the best first: {what_helps(config)}"
        kept, needed = sum(survivors.values()), sum(outputs[name] for name in survivors)
        if kept < needed:
            advice = f"; all layers have {kept:,} survivors for {needed:,} outputs, so lower final_rate"
        advice = "" if self._starving else advice
        self._starving.update(found)
        names = listed([_shortage(name, survivors[name], outputs[name]) for name in found], _NAMED)
        warn(f"fewer survivors than outputs in {names}: some of their outputs have no input, the layers starve{advice}")

    def _warn_of_dead(self, shared: SharedSparsity, names: Collection[str]) -> None:
        weights = {
            name: weight for name, weight in shared.weights().items() if name in names and name not in self._dead
        }
        if not weights:
            return
        self._dead.update(weights)
        if all(weight.device.type == "cpu" for weight in weights.values()):
            counts = shared.counts()
        else:  # without the ties: to count them, the host would have to wait
            counts = {name: PruneCount(weight.numel()) for name, weight in weights.items()}
        warn_of_dead(weights, counts, shared.config)

    def _is_due(self, shared: SharedSparsity) -> bool:
        position, config = shared.position, shared.config
        step, kept = position.step, shared.budget.total - position.zeros
        if step < self._step:  # an earlier state was loaded
            self._step, self._kept = -math.inf, math.inf
        if shared.frozen or not position.zeros or 2 * position.zeros < shared.final_zeros:
            return False
        assert config.end_step is not None
        since, steps = step - self._step, config.end_step - config.start_step
        fallen = kept <= (1 - _FALL) * self._kept and since >= min(_SCHEDULE * steps, _STEPS)
        return fallen or step == config.end_step or since >= _TRAINING * config.total_steps

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy. It does not warn again, and the counts that a GPU writes are not for it."""
        return {**vars(self), "_counted": None}


@dataclass
class _Counted:
    """The survivors of each weight, which a GPU may not have written yet."""

    names: tuple[str, ...]
    numbers: Tensor  # on the CPU
    written: torch.cuda.Event | None

    @classmethod
    def start(cls, shared: SharedSparsity) -> _Counted:
        """Count the survivors of all weights."""
        counts = shared.survivors()
        names, device = tuple(counts), next(iter(counts.values())).device
        numbers = torch.stack([count.to(device) for count in counts.values()])
        if device.type != "cuda":
            return cls(names, numbers.cpu(), None)
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
        written = torch.cuda.Event()
        written.record(torch.cuda.current_stream(device))
        return cls(names, host, written)

    @property
    def arrived(self) -> bool:
        """Whether the numbers can be read without waiting."""
        return self.written is None or (not torch.cuda.is_current_stream_capturing() and self.written.query())

    @property
    def survivors(self) -> dict[str, int]:
        """The number of survivors of each weight, by name."""
        return dict(zip(self.names, self.numbers.tolist(), strict=True))


def _can_count(shared: SharedSparsity) -> bool:
    """Return whether the weights have values, are not sharded, and no CUDA graph is being captured."""
    threshold = shared.position.groups[0].threshold
    if shared.sharded or not concrete(threshold) or any(original.is_meta for original in shared.originals):
        return False
    return threshold.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _shortage(name: str, survivors: int, outputs: int) -> str:
    """Return the name of a weight with its two numbers."""
    return f"{name} ({survivors:,} survivor{'s' * (survivors != 1)} for {outputs:,} outputs)"

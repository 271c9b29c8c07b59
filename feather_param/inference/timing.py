"""Time layers and networks, in turns.

The shortest of several times counts: what else the machine does only makes a call longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

_MAX_FRACTION = 0.9  # of the dense time; smaller gains are within the noise of the timings
_LAYER_SECONDS, _NETWORK_SECONDS = 0.05, 1.0


class Trial:
    """A replacement for a layer's forward. It times the layer and its sparse twin on each input.

    Args:
        layer: the dense layer.
        sparse: the layer that may take its place.
    """

    def __init__(self, layer: nn.Module, sparse: nn.Module) -> None:
        self.layer, self.sparse = layer, sparse
        self.dense_seconds = self.sparse_seconds = 0.0  # of all calls

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        def dense() -> Tensor:
            return type(self.layer).forward(self.layer, *inputs, **named)

        seconds = seconds_of({"dense": dense, "sparse": lambda: self.sparse(*inputs, **named)}, _LAYER_SECONDS)
        self.dense_seconds += seconds["dense"]
        self.sparse_seconds += seconds["sparse"]
        return dense()

    @property
    def called(self) -> bool:
        """Whether the layer was called."""
        return self.dense_seconds > 0

    @property
    def wins(self) -> bool:
        """Whether the sparse layer is clearly faster."""
        return self.called and self.sparse_seconds < _MAX_FRACTION * self.dense_seconds


def run_trials(trials: Iterable[Trial], call: Callable[[], object]) -> None:
    """Call the model once while each trial replaces the forward of its layer.

    Forward hooks would disable torch's fused kernels.
    """
    replaced: list[Any] = []
    try:
        for trial in trials:
            trial.layer.forward = trial
            replaced.append(trial.layer)
        call()
    finally:
        for layer in replaced:
            del layer.forward


def seconds_of(calls: Mapping[str, Callable[[], object]], budget: float = _NETWORK_SECONDS) -> dict[str, float]:
    """Return the shortest time of each call. In a round each call runs once.

    Args:
        calls: functions by name.
        budget: seconds after which no further round begins. There are at least 3 rounds and at most 50.
    """
    shortest = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()  # the first call takes longer
    end = time.perf_counter() + budget
    for i in range(50):
        if i >= 3 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            shortest[name] = min(shortest[name], time.perf_counter() - start)
    return shortest

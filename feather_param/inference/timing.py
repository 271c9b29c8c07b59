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
_LEAST, _MOST = 3, 50  # rounds
_CLEAR = 2.0  # a layer that takes so many times the other's time in each of the first rounds is slower


class Trial:
    """A replacement for a layer's forward. It times the layer and its sparse twin on each input.

    Args:
        layer: the dense layer.
        build: returns the sparse layer that may take its place. Only a faster one is kept.
    """

    def __init__(self, layer: nn.Module, build: Callable[[nn.Module], nn.Module]) -> None:
        self.layer, self._build = layer, build
        self.sparse: nn.Module | None = None
        self.sparse_bytes = 0
        self.dense_seconds = self.sparse_seconds = 0.0  # of all calls
        self.called = False
        self.error = ""  # of the sparse layer; the dense one stays

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        def dense() -> Tensor:
            return type(self.layer).forward(self.layer, *inputs, **named)

        self.called = True
        output = dense()  # the first call takes longer
        if not self.error:
            sparse = self.sparse or self._build(self.layer)
            self.sparse_bytes = sum(buffer.nbytes for buffer in sparse.buffers())
            try:
                sparse(*inputs, **named)
            except ImportError:
                raise
            except Exception as error:
                self.error = (str(error).strip() or type(error).__name__).splitlines()[0]
            else:
                calls = {"dense": dense, "sparse": lambda: sparse(*inputs, **named)}
                seconds = seconds_of(calls, _LAYER_SECONDS, stop_if_clear=True)
                self.dense_seconds += seconds["dense"]
                self.sparse_seconds += seconds["sparse"]
            self.sparse = sparse if self.wins else None
        return output

    @property
    def wins(self) -> bool:
        """Whether the sparse layer is clearly faster."""
        return self.called and not self.error and self.sparse_seconds < _MAX_FRACTION * self.dense_seconds


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


def seconds_of(
    calls: Mapping[str, Callable[[], object]], budget: float = _NETWORK_SECONDS, *, stop_if_clear: bool = False
) -> dict[str, float]:
    """Return the shortest time of each call. In a round each call runs once.

    Args:
        calls: functions by name.
        budget: seconds after which no further round begins. There are at least 3 rounds and at most 50.
        stop_if_clear: whether to stop after 3 rounds if the first call is more than twice as fast as the second in
            each of them, or more than twice as slow.
    """
    rounds: list[list[float]] = []
    end = time.perf_counter() + budget
    while len(rounds) < _LEAST or (len(rounds) < _MOST and time.perf_counter() < end):
        times = []
        for call in calls.values():
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        rounds.append(times)
        if stop_if_clear and len(rounds) == _LEAST:
            faster = all(first * _CLEAR < second for first, second, *_ in rounds)
            if faster or all(first > second * _CLEAR for first, second, *_ in rounds):
                break
    return dict(zip(calls, map(min, zip(*rounds, strict=True)), strict=True))

"""Time a layer's dense and sparse methods on the inputs that it gets in the model."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from feather_param.inference import kernel

_MAX_FRACTION = 0.9  # of the dense time; smaller gains are within the noise of the timings


class Trial:
    """A replacement for a layer's forward. It times all methods on each input and returns the dense output.

    Args:
        layer: a Linear or Conv layer.
        sparse: its `SparseLayer`, whose method is set to the fastest one.
    """

    def __init__(self, layer: Any, sparse: Any) -> None:
        self.layer, self.sparse = layer, sparse
        self.seconds: dict[str, float] = {}  # of all calls, by method

    def __call__(self, input: Tensor) -> Tensor:
        methods = ("csr", "kernel") if kernel.compiled() else ("csr",)

        def run(method: str) -> Tensor:
            self.sparse.method = method
            return self.sparse.forward(input)

        def dense() -> Tensor:
            return type(self.layer).forward(self.layer, input)

        calls = {"dense": dense} | {method: functools.partial(run, method) for method in methods}
        for method, times in seconds_of(calls, 0.1).items():
            self.seconds[method] = self.seconds.get(method, 0.0) + statistics.median(times)
        self.sparse.method = min(methods, key=self.seconds.__getitem__)
        return dense()

    @property
    def wins(self) -> bool:
        """Whether the fastest sparse method is clearly faster than the dense one."""
        return bool(self.seconds) and self.seconds[self.sparse.method] < _MAX_FRACTION * self.seconds["dense"]


def run_trials(trials: Iterable[Trial], call: Callable[[], object]) -> None:
    """Call the model once while each trial replaces the forward of its layer.

    Forward hooks would disable torch's fused kernels.
    """
    for trial in trials:
        trial.layer.forward = trial
    try:
        call()
    finally:
        for trial in trials:
            del trial.layer.forward


def seconds_of(calls: Mapping[str, Callable[[], object]], budget: float) -> dict[str, list[float]]:
    """Return the seconds of each call in each round. In a round each call runs once.

    Args:
        calls: functions by name; one has the name ``"dense"``.
        budget: seconds after which no further round begins. There are at least 5 rounds and at most 50.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # the first call takes longer
    end = time.perf_counter() + budget
    while (n := len(seconds["dense"])) < 5 or (n < 50 and time.perf_counter() < end):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds

"""How many networks train at once, and whether they are compiled: what part c measured decides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.gpu.budget import MARGIN, Records, finished
from benchmarks.gpu.epochs import COMPILING

__all__ = ["Choice", "Speed", "choose", "speeds"]

_MARGIN = 1.08  # of a speed that was measured on this GPU
_SETUP = 10.0  # seconds to build eight networks, to record their step, and to evaluate them at the end

# Seconds of a step of one network, alone and among eight, captured. ResNet-20 and MobileNetV1 were measured on an H200.
# DenseNet is a guess from its work, which is four times that of ResNet-20.
_KNOWN = {"mobilenet_v1": (3.2e-3, 1.5e-3), "resnet20": (2.9e-3, 1.7e-3), "densenet": (9.0e-3, 6.5e-3)}


@dataclass(frozen=True)
class Speed:
    """How fast networks of a kind train together.

    Attributes:
        alone: seconds of a step of one network.
        together: seconds of a step of `count` networks, over their number.
        count: the most networks that train at once.
        compiled: whether they are compiled.
        margin: a training is started if this multiple of its expected time is left.
    """

    alone: float
    together: float
    count: int
    compiled: bool = False
    margin: float = MARGIN

    def step(self, count: int) -> float:
        """Return the seconds of a step of this number of networks. A few take as long as one."""
        return max(self.alone, count * self.together)

    @property
    def as_one(self) -> int:
        """How many networks take as long as one."""
        return max(1, min(self.count, int(self.alone / self.together)))

    def seconds(self, count: int, steps: int, warm: bool) -> float:
        """Return the seconds of a training of this number of networks, whose kind is compiled already if warm."""
        return _SETUP + (COMPILING if self.compiled and not warm else 0.0) + steps * self.step(count)


@dataclass(frozen=True)
class Choice:
    """A number of networks, their speed, and the seconds of their training."""

    count: int
    speed: Speed
    seconds: float


def speeds(measured: Records, network: str, gpu: str | None, most: int) -> list[Speed]:
    """Return the speeds of a network: those that part c measured on this GPU, or else those of an H200.

    Args:
        measured: the records of part c.
        network: the name of the network.
        gpu: the name of the GPU.
        most: the most networks that train at once.
    """
    figures = [
        record["figures"] for record in measured.values() if finished(record) and record["machine"]["gpu"] == gpu
    ]
    own = [each for each in figures if each["network"] == network and each["captured"]]
    found = []
    for compiled in (False, True):
        steps = {each["count"]: each["sparse"]["step"] for each in own if each["compiled"] == compiled}
        if steps:
            count = min(steps, key=steps.__getitem__)
            found.append(Speed(steps.get(1, steps[count]), steps[count], min(count, most), compiled, _MARGIN))
    return found or [Speed(*_KNOWN[network], most)]


def choose(found: Iterable[Speed], runs: int, steps: int, room: float, warm: bool) -> Choice | None:
    """Return the largest number of runs that end within the room, with a margin; the fastest speed for it.

    Args:
        found: the speeds of the network.
        runs: number of runs.
        steps: number of steps of a run.
        room: the seconds that are left.
        warm: whether the network is compiled already.

    Returns:
        None if not even one run fits.
    """
    fitting = [
        Choice(count, speed, seconds)
        for speed in found
        for count in range(1, min(runs, speed.count) + 1)
        if speed.margin * (seconds := speed.seconds(count, steps, warm)) <= room
    ]
    return min(fitting, key=lambda choice: (-choice.count, choice.seconds)) if fitting else None

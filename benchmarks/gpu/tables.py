"""Parts d and e: runs of CIFAR-100, several networks at once, each of which can be continued at the epoch.

The networks that train at once, and their number, follow from the times that part c measured on this GPU. If not even
one run fits into the time, one is started anyhow, with those that take no longer beside it, and stops at the last epoch
that fits. The next call continues it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks import together
from benchmarks.cifar100_results import Result
from benchmarks.cifar100_run import BATCH, Run, read
from benchmarks.gpu.budget import MARGIN, Call, Figures, Part, Piece, Records
from benchmarks.gpu.epochs import Warm
from benchmarks.gpu.files import join, split
from benchmarks.gpu.speeds import Choice, choose, speeds
from examples.data import ImageData

__all__ = ["Order", "Tables", "contents"]

Order = Callable[[Sequence[Result]], list[Run]]
"""The runs of a part in their order, from the results so far."""

_ENDING = 5.0  # seconds to write a checkpoint, or to evaluate and bake


def contents(records: Records) -> list[Result]:
    """Return the contents of the JSON files of the runs of a part."""
    return [run for record in records.values() for run in record.get("figures", {}).get("runs", [])]


@dataclass
class Tables:
    """What parts d and e have in common.

    Attributes:
        folder: the folder of the checkpoints.
        load: returns the data set on the device.
        device: the device.
        images: number of training images.
        measured: returns the records of part c.
        results: returns the results of both parts.
        backend: the backend of `torch.compile`.
        most: the most networks that train at once. A group that raises halves it.
        gpu: the name of the GPU.
        pace: factor of all expected times.
        warm: the networks that this process has compiled.
    """

    folder: Path
    load: Callable[[], ImageData]
    device: torch.device
    images: int
    measured: Callable[[], Records]
    results: Callable[[], Sequence[Result]]
    backend: str
    most: int
    gpu: str | None
    pace: float
    warm: Warm
    _data: list[ImageData] = field(default_factory=list)
    _failed: set[Run] = field(default_factory=set)  # the runs that raised although each trained alone

    def part(self, letter: str, title: str, file: str, order: Order) -> Part:
        """Return a part that makes runs in an order."""
        return Part(letter, title, file, partial(self.plan, order), self._prepare, self._close)

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        join(self.folder)
        if not self._data:
            self._data.append(self.load())

    def _close(self) -> None:
        if self.folder.is_dir():
            split(self.folder)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def plan(self, order: Order, records: Records, room: float) -> list[Piece]:
        """Return groups of the runs that are left: those that were stopped, then one that fits into the room."""
        for result in contents(records):  # the file of the part holds them by now
            (self.folder / f"{Run(**result['run']).name}.json").unlink(missing_ok=True)
        results = [*contents(records), *self.results()]
        done = [result["run"] for result in results]
        left = [run for run in order(results) if asdict(run) not in done and run not in self._failed]
        stopped = [group for group in together.unfinished(self.folder) if {*group} <= {*left}]
        pieces = [self._piece(group, None) for group in stopped]
        left = [run for run in left if not any(run in group for group in stopped)]
        while left:
            like = [run for run in left if (run.network, run.epochs) == (left[0].network, left[0].epochs)]
            choice = self._choice(like, math.inf if pieces else room)
            group = like[: choice.count if choice else self._largest(like).speed.as_one]
            pieces.append(self._piece(group, choice))
            left = [run for run in left if run not in group]
        return pieces

    def _largest(self, runs: Sequence[Run]) -> Choice:
        """Return how many of some runs of one network train at once, whatever the time."""
        choice = self._choice(runs, math.inf)
        assert choice is not None
        return choice

    def _choice(self, runs: Sequence[Run], room: float) -> Choice | None:
        """Return how many of some runs of one network train at once within the room; None if none fits."""
        run = runs[0]
        found = speeds(self.measured(), run.network, self.gpu, self.most)
        room *= MARGIN / self.pace  # the margin follows from the speed instead
        return choose(found, len(runs), self._steps(run), room, run.network in self.warm)

    def _steps(self, run: Run) -> int:
        return run.epochs * (self.images // BATCH)

    def _piece(self, group: list[Run], choice: Choice | None) -> Piece:
        """Return the piece of a group. Without a choice it was stopped before, or does not fit.

        It stops itself before the time is over, so that it needs the time of one epoch only.
        """
        speed = (choice or self._largest(group)).speed
        steps = self._steps(group[0])
        epoch = self.pace * speed.step(len(group)) * steps / group[0].epochs
        seconds = self.pace * speed.seconds(len(group), steps, group[0].network in self.warm)
        setup = seconds - epoch * group[0].epochs
        names = group[0].name + (f" and {len(group) - 1} more" if len(group) > 1 else "")
        kind = "compiled and captured" if speed.compiled else "captured"
        reason = f"{len(group)} at once, {steps} steps of {1e3 * speed.step(len(group)):.1f} ms, {kind}"
        make = partial(self._make, group, speed.compiled, epoch)
        return Piece(names, seconds, reason, make, least=setup + epoch + _ENDING * self.pace)

    def _make(self, group: list[Run], compiled: bool, epoch: float, call: Call) -> Figures:
        """Train a group, and return the contents of the files of its runs, or the epoch at which it stopped."""
        readings = [call.left()]

        def stopped() -> bool:
            readings.append(call.left())
            longest = max([epoch, *(a - b for a, b in pairwise(readings[1:]))])
            return call.stopped() or call.left() < MARGIN * longest + _ENDING

        todo = [run for run in group if run.done(self.folder) is None]
        backend = self.backend if compiled else None
        try:
            done = not todo or together.execute(
                todo, self._data[0], self.device, self.folder, backend=backend, stopped=stopped
            )
        except Exception:
            if len(group) > 1:
                self.most = len(group) // 2
            else:
                self._failed.update(group)
            raise
        if compiled:
            self.warm.add(group[0].network)
        if not done:
            return {"unfinished": f"stopped {len(readings) - 1} epochs later, to be continued", "runs": []}
        return {"runs": [read(self.folder / f"{run.name}.json") for run in group]}

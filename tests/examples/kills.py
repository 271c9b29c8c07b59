"""Kill a short run of a training script many times, resume it each time, and compare it with one that is not killed.

    python -m tests.examples.kills 20 6     # kills of cifar100.py and of imagenet.py; then the seed of the moments

Each attempt is a fork of this process, which has imported everything. It sends itself a signal when a function of
Python or C is called or returns: at a random one, inside `torch.save`, or before or after a file is renamed. Works in
the current folder, which is empty at first.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import sklearn.datasets  # noqa: F401  # each attempt would import it
import torch

from examples import cifar100, imagenet, run_log
from tests.examples import imagenet as pictures
from tests.examples.runs import TINY, Picture, content, equal, only, tiny

Event = Callable[[FrameType, str, Any], bool]
"""Whether to count an event of `sys.setprofile`."""

NEVER = 10**9


class Saving:
    """The events inside `torch.save`."""

    def __init__(self) -> None:
        self._inside = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> bool:
        if frame.f_code is torch.save.__code__ and event in ("call", "return"):
            self._inside = event == "call"
        return self._inside


EVENTS: dict[str, Callable[[], Event]] = {
    "all": lambda: lambda *_: True,
    "inside torch.save": Saving,
    "before a rename": lambda: lambda _, event, argument: event == "c_call" and argument is os.replace,
    "after a rename": lambda: lambda _, event, argument: event == "c_return" and argument is os.replace,
}


class Run:
    """A run of a script in a folder.

    Args:
        folder: an empty folder.
        script: the script.
        arguments: its arguments.
    """

    def __init__(self, folder: Path, script: ModuleType, arguments: Sequence[str]) -> None:
        folder.mkdir()
        self.folder, self._script, self._arguments = folder.resolve(), script, arguments

    def output(self) -> str:
        """Return what the last attempt printed."""
        return (self.folder / "output.txt").read_text()

    def attempt(self, number: int = NEVER, kind: str = "all", sent: int = signal.SIGKILL) -> int:
        """Start the run or resume it, with a signal at an event. Return the status of `os.waitpid`."""
        folders = list(self.folder.glob("runs/*"))
        arguments = ["--resume", str(folders[0])] if folders else self._arguments
        process = os.fork()
        if not process:
            self._child(arguments, number, kind, sent)
        return os.waitpid(process, 0)[1]

    def _child(self, arguments: Sequence[str], number: int, kind: str, sent: int) -> None:
        counts, kinds = dict.fromkeys(EVENTS, 0), {name: make() for name, make in EVENTS.items()}
        if number != NEVER:
            kinds = {kind: kinds[kind]}

        def count(frame: FrameType, event: str, argument: Any) -> None:
            for name, counted in kinds.items():
                counts[name] += counted(frame, event, argument)
            if counts[kind] == number:
                sys.setprofile(None)
                os.kill(os.getpid(), sent)

        status = 70  # of an exception
        try:
            os.chdir(self.folder)
            file = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.setprofile(count)
            status = self._script.main(arguments)
            sys.setprofile(None)
            Path("events.json").write_text(json.dumps(counts))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def clean(self) -> None:
        """Remove the folder of a run that was killed before its first checkpoint, which cannot be resumed."""
        for folder in self.folder.glob("runs/*"):
            if not (folder / "checkpoint.pt").exists():
                assert self.attempt() == 2 << 8, self.output()
                assert "no checkpoint: start a new one" in self.output()
                shutil.rmtree(folder)


def moments(counts: dict[str, int], seed: int) -> Iterator[tuple[int, str, int]]:
    """Return arguments of `Run.attempt`: kills at random moments of all kinds, and a SIGTERM after every fourth."""
    draw = random.Random(seed)
    # Most attempts shall end before the run does, so that all of it is killed.
    most = {"all": counts["all"] // 3, "inside torch.save": counts["inside torch.save"] // 3}
    while True:
        for kind in EVENTS:
            yield draw.randint(1, most.get(kind, 2)), kind, signal.SIGKILL
        yield draw.randint(1, most["all"]), "all", signal.SIGTERM


def main(script: ModuleType, arguments: Sequence[str], kills: int, seed: int) -> None:
    """Compare a run that is killed a number of times with one that is not."""
    if not kills:
        return
    name = script.PROGRAM.removesuffix(".py")
    whole, killed = (Run(Path(f"{name}_{end}"), script, arguments) for end in ("whole", "killed"))
    assert whole.attempt() == 0, whole.output()
    counts = json.loads((whole.folder / "events.json").read_text())
    statuses = []
    for moment in moments(counts, seed):
        statuses.append(killed.attempt(*moment))
        # Dead at once, stopped by the signal with a checkpoint, or finished before it.
        assert statuses[-1] in (moment[2], (128 + signal.SIGTERM) << 8, 0), (moment, statuses[-1], killed.output())
        killed.clean()
        if statuses.count(signal.SIGKILL) == kills:
            break
    assert killed.attempt() == 0, killed.output()
    compare(whole.folder, killed.folder)
    names = {signal.SIGKILL: "killed", signal.SIGTERM: "ended", (128 + signal.SIGTERM) << 8: "stopped", 0: "finished"}
    print(name, *(f"{statuses.count(status)} {name}" for status, name in names.items()), sep=", ")


def compare(whole: Path, killed: Path) -> None:
    """Assert that two runs have the same files with the same content, and no others."""
    runs = [only(folder, "runs/*") for folder in (whole, killed)]
    for run in runs:
        names = {path.name.partition(".tfevents")[0] for path in run.iterdir()}
        assert names == {"checkpoint.pt", "config.json", "events.out", "results.json", "summary.png"}, names
    first, second = (content(folder, run) for folder, run in zip((whole, killed), runs, strict=True))
    for name in first:
        assert equal(first[name], second[name]), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # TensorBoard tells what it drops
    run_log.draw = Picture  # type: ignore[assignment]
    cifar100.NETWORKS["tiny"] = tiny
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    main(cifar100, [*TINY, "--model", "tiny"], int(sys.argv[1]), seed)
    images = pictures.draw(Path("images").resolve())
    main(imagenet, [*pictures.TINY, str(images), "--recipe", "v2"], int(sys.argv[2]), seed)

"""Copy the runs of parts d and e to the results of the CIFAR-100 table."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import timing
from benchmarks.cifar100_run import Run
from benchmarks.gpu.budget import read
from benchmarks.gpu.page import FILES
from benchmarks.gpu.tables import contents

__all__ = ["publish"]


def publish(folder: Path) -> int:
    """Write each run as a file of its own to ``benchmarks/results/cifar100_paper``, and return the number of files.

    Files that exist are not replaced.

    Raises:
        ValueError: the results are those of a rehearsal, or a file is damaged.
    """
    parts = [read(folder / FILES[letter]) for letter in ("d", "e")]
    if any(part.get("rehearsed") for part in parts):
        raise ValueError(f"expected results in {folder}, got a rehearsal; its accuracies mean nothing")
    target, count = timing.RESULTS / "cifar100_paper", 0
    for result in (result for part in parts for result in contents(part["pieces"])):
        path = target / f"{Run(**result['run']).name}.json"
        if not path.exists():
            target.mkdir(parents=True, exist_ok=True)
            timing.write_whole(path, json.dumps(result, indent=1) + "\n")
            count += 1
    return count

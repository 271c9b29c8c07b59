"""Time several ways of doing the same thing against each other, on a machine that does not stand still.

The ways take turns, one call each a round, so that what slows the machine slows them all; a ratio is the median
of the ratios within each round, and a time the median of its rounds.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from feather_param.files.atomic import replacing

__all__ = ["machine", "medians", "ratio", "rounds", "show", "write", "write_whole"]

RESULTS = Path(__file__).parent / "results"


def rounds(ways: Mapping[str, Callable[[], object]], n: int, warmup: int = 1) -> dict[str, list[float]]:
    """Return the seconds of each way in each of n rounds, after some that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    gc.collect()
    for i in range(warmup + n):
        for name, way in ways.items():
            _synchronise()
            start = time.perf_counter()
            way()
            _synchronise()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median time of each way, in seconds."""
    return {name: statistics.median(times) for name, times in seconds.items()}


def ratio(seconds: Mapping[str, Sequence[float]], name: str, reference: str) -> float:
    """Return the median over the rounds of one way's time over another's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))


def machine() -> dict[str, Any]:
    """Return what the figures were measured on and with."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


@cache
def _commit() -> str:
    """Return the commit as it was when first asked: a long process goes on with the code that it has loaded."""
    root = Path(__file__).parent.parent
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_whole(path: Path, text: str) -> None:
    """Write a file of text so that it holds the old content or the new, never a part of it."""
    with replacing(path) as file:
        file.write(text.encode())


def write(name: str, figures: Any) -> Path:
    """Write figures and machine to ``benchmarks/results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_whole(path, json.dumps({"machine": machine(), "figures": figures}, indent=1) + "\n")
    return path

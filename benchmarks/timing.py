"""Time several variants of the same work against each other, on a machine with other load.

The variants take turns: each is called once in a round, so that a slow moment of the machine affects all of them. A
ratio is the median of the ratios within each round. A time is the median over the rounds, or their minimum.
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
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from feather_param.files.atomic import atomic_write

__all__ = [
    "Elapsed",
    "machine",
    "medians",
    "minima",
    "ratio",
    "read",
    "rounds",
    "set_commit",
    "show",
    "spreads",
    "synchronise",
    "write",
    "write_whole",
]

RESULTS = Path(__file__).parent / "results"


class Elapsed(float):
    """Seconds that a call measured itself, because it runs in another process."""


def rounds(
    variants: Mapping[str, Callable[[], object]], n: int, warmup: int = 1, untimed: int = 0
) -> dict[str, list[float]]:
    """Return the seconds of each variant in each of n rounds, after some rounds of warm-up.

    Args:
        variants: the calls by name. A call that returns `Elapsed` measures itself.
        n: how many rounds are timed.
        warmup: how many rounds come before them.
        untimed: how many calls of a variant come right before each timed one. With one, the caches hold what the
            variant needs, as when it is called again and again, and the threads of the variant before it are asleep.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    gc.collect()
    for i in range(warmup + n):
        for name, call in variants.items():
            for _ in range(untimed):
                call()
            synchronise()
            start = time.perf_counter()
            result = call()
            result = result if isinstance(result, Elapsed) else None  # what the call returns is freed in its time
            synchronise()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start if result is None else result)
    return seconds


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median time of each variant, in seconds."""
    return {name: statistics.median(times) for name, times in seconds.items()}


def minima(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the shortest time of each variant, in seconds: the one with the least of the machine's other load."""
    return {name: min(times) for name, times in seconds.items()}


def spreads(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the distance of the quartiles of each variant's times, as a fraction of their median."""
    quartiles = {name: statistics.quantiles(times, n=4, method="inclusive") for name, times in seconds.items()}
    return {name: (upper - lower) / median for name, (lower, median, upper) in quartiles.items()}


def ratio(seconds: Mapping[str, Sequence[float]], name: str, reference: str) -> float:
    """Return the median over the rounds of the time of one variant over that of a reference."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))


def machine() -> dict[str, Any]:
    """Return the machine, the versions and the commit of a measurement."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "torchvision": _version("torchvision"),
        "threads": torch.get_num_threads(),
        "commit": _given_commit or _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


_given_commit = ""


def set_commit(commit: str) -> None:
    """Tell `machine` the commit of a copy of the tree without .git. An empty one returns to that of git."""
    global _given_commit
    _given_commit = commit


@cache
def _commit() -> str:
    """Return the commit at the first call: a long process keeps the code that it has loaded."""
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    except OSError:  # there is no git
        return ""
    return done.stdout.strip()


@cache
def _driver() -> str | None:
    """Return the version of the driver of the GPU."""
    if not torch.cuda.is_available():
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def _version(package: str) -> str | None:
    """Return the version of an installed package without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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
    """Write a text file. The path holds either the old content or the new, never a part of it."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write(name: str, figures: Any, **more: Any) -> Path:
    """Write figures and the machine to ``benchmarks/results/<name>.json``, and return the path.

    Args:
        name: the name of the file without its ending.
        figures: what was measured, as JSON can hold it.
        more: other facts about the machine, or other values for those of `machine`.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_whole(path, json.dumps({"machine": machine() | more, "figures": figures}, indent=1) + "\n")
    return path


def read(name: str) -> dict[str, Any]:
    """Return the figures that `write` wrote at this commit on such a processor, or nothing."""
    try:
        written = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    now = machine()
    same = now["commit"] and all(written["machine"].get(key) == now[key] for key in ("commit", "cpu"))
    return written["figures"] if same else {}

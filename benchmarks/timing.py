"""Time several variants of the same work against each other, on a machine with other load.

The variants take turns: each is called once in a round, so that a slow moment of the machine affects all of them. A
ratio is the median of the ratios within each round. A time is the median over the rounds.
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

__all__ = ["machine", "medians", "ratio", "rounds", "set_commit", "show", "synchronise", "write", "write_whole"]

RESULTS = Path(__file__).parent / "results"


def rounds(variants: Mapping[str, Callable[[], object]], n: int, warmup: int = 1) -> dict[str, list[float]]:
    """Return the seconds of each variant in each of n rounds, after some rounds of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    gc.collect()
    for i in range(warmup + n):
        for name, call in variants.items():
            synchronise()
            start = time.perf_counter()
            call()
            synchronise()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median time of each variant, in seconds."""
    return {name: statistics.median(times) for name, times in seconds.items()}


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


def write(name: str, figures: Any) -> Path:
    """Write figures and the machine to ``benchmarks/results/<name>.json``, and return the path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_whole(path, json.dumps({"machine": machine(), "figures": figures}, indent=1) + "\n")
    return path

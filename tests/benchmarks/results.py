"""Results of runs that were never made."""

from __future__ import annotations

from typing import Any

from benchmarks import timing


def made_up(method: str, rate: float, seed: int, accuracy: float, **changes: Any) -> dict[str, Any]:
    run = {"network": "resnet20", "width": 0, "method": method, "rate": rate, "seed": seed, "epochs": 160}
    return {
        "run": {**run, "train_size": None},
        "accuracy": accuracy,
        "zeros": round(1000 * rate),
        "promised": round(1000 * rate),
        "total": 1000,
        "dead": [],
        "seconds": 100.0,
        "machine": timing.machine(),
        **changes,
    }

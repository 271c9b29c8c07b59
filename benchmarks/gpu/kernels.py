"""Part b: the threshold, the operator and whole steps of a large network, eager, compiled and captured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks import device as kernels
from benchmarks import timing
from benchmarks.gpu.budget import Call, Figures, Part, Piece, failure
from benchmarks.gpu.sizes import Sizes
from benchmarks.training_step import NETWORKS, stepper

__all__ = ["part", "synchronisations"]

POWERS = (0.5, 1.0, 3.0)


def part(sizes: Sizes, device: torch.device) -> Part:
    """Return the part."""
    weights, rounds, network = sizes.weights, sizes.rounds, sizes.step_network

    def threshold(call: Call) -> Figures:
        return {"rows": kernels.threshold(weights, device, rounds, True)}

    def operator(call: Call) -> Figures:
        return {"rows": kernels.operator(weights, device, rounds, True, POWERS)}

    # A step of ResNet-50 with a batch of 128 takes 20 to 51 ms on an H200.
    pieces = [
        Piece("threshold", 8.0 * sizes.pace, "6 s to start CUDA and to compile a kernel, 2 s of timing", threshold),
        Piece("operator", 8.0 * sizes.pace, "three kernels, 12 graphs, 2 s of timing", operator),
        Piece(
            f"{network}, eager and captured",
            25.0 * sizes.pace,
            "two networks, choice of algorithms, 4 x 27 steps of 30 to 50 ms",
            partial(_steps, sizes, device, False),
        ),
        Piece(
            f"{network}, compiled, and compiled and captured",
            140.0 * sizes.pace,
            "two compilations of 65 s, 4 x 27 steps of 20 to 35 ms",
            partial(_steps, sizes, device, True),
        ),
    ]
    return Part("b", "Kernels and whole steps", "b_kernels.json", lambda records, room: pieces, most=220.0)


def _steps(sizes: Sizes, device: torch.device, compiled: bool, call: Call) -> Figures:
    """Return the times of whole steps, dense and sparse, and their synchronisations.

    If the steps cannot be captured, the figures of the others are kept, with the error.
    """
    build, _ = NETWORKS[sizes.step_network]
    x = torch.randn(sizes.step_shape, device=device)
    flags = compiled, True, False, True, sizes.backend
    steps = {kind: stepper(kind, build, x, *flags) for kind in ("dense", "sparse")}
    first = "compiled" if compiled else "eager"
    figures: dict[str, Any] = {"times": {first: _timed(steps, sizes.rounds)}}
    figures["synchronisations"] = {
        kind: synchronisations(step, sizes.step_count, device) for kind, step in steps.items()
    }
    figures["steps"], figures["batch"] = sizes.step_count, list(sizes.step_shape)
    second = "compiled and captured" if compiled else "captured"
    try:
        graphs = {kind: kernels.captured(step, device) for kind, step in steps.items()}
        figures["times"][second] = _timed(graphs, sizes.rounds)
    except Exception as error:  # the other times took a minute, and stay
        figures["error"] = failure(error)
    return figures


def _timed(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    seconds = timing.rounds(steps, rounds, warmup=2)
    return {**timing.medians(seconds), "sparse over dense": timing.ratio(seconds, "sparse", "dense")}


def synchronisations(step: Callable[[], object], count: int, device: torch.device) -> int | None:
    """Return how often the host waits for the device in a number of steps; None on a CPU.

    CUDA's debug mode warns of each wait. It does not know `torch.cuda.synchronize` and events.
    """
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("warn")
            for _ in range(count):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)

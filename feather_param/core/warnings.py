"""Warnings about zeros that come too early or are lost, and about weights with no survivors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from feather_param.allocations import global_magnitude
from feather_param.core.config import Config
from feather_param.ops.count import PruneCount
from feather_param.utils.text import listed
from feather_param.utils.warn import warn


def warn_of_early(call: str, zeros: int, final_zeros: int) -> None:
    """Warn of a call that fixes the zeros before the schedule has reached ``final_rate``."""
    purpose = "; to stop early on purpose, call freeze() first" if zeros else ""
    warn(
        f"expected {call} after the {final_zeros:,} zeros of final_rate are reached, got it at {zeros:,}: call "
        "controller.step() after each optimizer.step(), or pass optimizer= to sparsify; if you bake a saved "
        f"state, choose one from end_step or later{purpose}"
    )


def warn_of_late_step() -> None:
    """Warn of a step of the optimizer after the bake."""
    warn(
        "this optimizer has just stepped a model that was desparsified: momentum and weight decay make pruned weights "
        "non-zero again, so its zeros are lost; build a new optimizer and sparsify again, or stop training before "
        "desparsify"
    )


def what_helps(config: Config) -> str:
    """Return what helps layers with few survivors or none and is not in use, in the order in which it was measured."""
    advice = {
        "p=1": config.p > 1.0,
        "allocation=allocations.lamp": config.allocation is global_magnitude,
        "min_nonzero_per_layer": not config.min_nonzero_per_layer,
    }
    return ", ".join([*(each for each, unused in advice.items() if unused), "a lower final_rate or learning rate"])


def warn_of_dead(weights: Mapping[str, Tensor], counts: Mapping[str, PruneCount], config: Config) -> bool:
    """Warn of weights with no survivors, and return whether there are any.

    A weight has no survivors if all its elements are pruned or equal the threshold: the operator makes both zero.
    """
    dead = [
        name
        for name, weight in weights.items()
        if weight.numel() and weight.numel() == counts[name].zeros + counts[name].ties
    ]
    if not dead:
        return False
    hint = f"what helps, the best first: {what_helps(config)}; or leave these dense with exclude"
    if ties := [name for name in dead if counts[name].ties]:
        hint += (
            f"; all kept elements of {listed(ties)} equal the threshold (weights clipped to one magnitude?), and "
            "the operator makes them zero: clip to a wider range"
        )
    warn(f"nothing survives in {listed(dead)}: the layers that follow get a constant input; {hint}")
    return True

"""Sparsified convolutional networks that several tests save and load."""

from __future__ import annotations

from torch import nn

import feather_param
from feather_param import schedules
from tests.network import WEIGHTS, net

FINAL_ZEROS = round(0.9 * WEIGHTS)


def sparsified(seed: int = 0, **arguments) -> tuple[nn.Sequential, feather_param.Controller]:
    """Return a network before its first step, with a rate of zero, and its controller."""
    model = net(seed)
    return model, feather_param.sparsify(model, **{"final_rate": 0.9, "total_steps": 4, **arguments})


def at_final_rate(seed: int = 0, **arguments) -> tuple[nn.Sequential, feather_param.Controller]:
    """Return a network that has its final number of zeros before its first step, and its controller."""
    return sparsified(seed, schedule=schedules.constant, **arguments)

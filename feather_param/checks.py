"""Checks of arguments, at the door."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

__all__ = ["Theta", "exponent", "fraction", "guards", "instance", "integer", "model_and_rate", "slope", "slope_at"]

Theta = Callable[[float], float]
"""Maps the current rate to the scale of the gradient of pruned weights."""


def model_and_rate(model: Any, final_rate: Any) -> float:
    """Check the two arguments that everything starts from; return the rate."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be an nn.Module, got {type(model).__name__}")
    final_rate = _real("final_rate", final_rate)
    if not 0.0 < final_rate < 1.0:
        percent = f"; {final_rate:g} % is {final_rate / 100:g}" if 1.0 < final_rate < 100.0 else ""
        raise ValueError(f"expected final_rate, the fraction of zeros, in (0, 1), got {final_rate}{percent}")
    _refuse_wrapped(model)
    return final_rate


def _refuse_wrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"expected a model of plain modules, got {type(module).__name__} at {name or 'the root'}; "
                "sparsify before scripting, and script after desparsify"
            )
        for cls in type(module).__mro__:
            if cls.__module__.startswith(("torch.distributed.fsdp", "torch.nn.parallel.distributed")):
                raise ValueError(
                    f"expected a model that is not yet wrapped, got {cls.__name__} at {name or 'the root'}; "
                    "the order is: sparsify(model), then DDP or fully_shard, then the optimizer"
                )


def guards(min_params: Any, max_rate: Any, min_nonzero: Any) -> tuple[int, float, int]:
    """Check what keeps weights from being pruned, or pruned away; no largest rate is 1."""
    if max_rate is not None:
        max_rate = _real("max_rate_per_layer", max_rate)
        if not 0.0 < max_rate < 1.0:
            raise ValueError(f"expected max_rate_per_layer, a fraction of zeros, in (0, 1), got {max_rate}")
    return (
        integer("min_params", min_params, 0),
        1.0 if max_rate is None else max_rate,
        integer("min_nonzero_per_layer", min_nonzero, 0),
    )


def fraction(schedule: Callable[[float], float], progress: float) -> float:
    """Return what a schedule says, if it is a fraction."""
    value = schedule(progress)
    if not isinstance(value, Real) or not 0.0 <= float(value) <= 1.0:
        raise ValueError(
            f"expected schedule to return a fraction in [0, 1] of final_rate, got {value!r} for progress {progress}"
        )
    return float(value)


def _real(name: str, value: Any) -> float:
    """Return a number as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"expected {name} to be a number, got {value!r}")
    return float(value)


def integer(name: str, value: Any, least: int) -> int:
    """Return an int that is at least so much."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        hint = "; wrap it in int(...)" if isinstance(value, float) else ""
        raise TypeError(f"expected {name} to be an int, got {value!r}{hint}")
    if value < least:
        raise ValueError(f"expected {name} to be at least {least}, got {value}")
    return int(value)


def instance(value: Any, kind: type, source: str) -> None:
    """Refuse a value of another class, and tell where one of the right class comes from."""
    if not isinstance(value, kind):
        raise TypeError(f"expected a {kind.__name__} from {source}, got {type(value).__name__}")


def exponent(p: Any) -> float:
    """Return the operator's p."""
    p = _real("p", p)
    if not p >= 1.0:
        raise ValueError(f"expected p >= 1 or math.inf, got {p}")
    return p


def slope(theta: Any, final_rate: float) -> float | Theta:
    """Return the operator's theta, or the function of the rate that gives it; by the paper's rule where it is None."""
    if callable(theta):
        function: Any = theta
        for rate in (0.0, final_rate):
            slope_at(function, rate)
        return function
    theta = (0.5 if final_rate > 0.95 else 1.0) if theta is None else _real("theta", theta)
    if not 0.0 <= theta < math.inf:
        raise ValueError(f"expected theta to be a finite number >= 0, got {theta}")
    return theta


def slope_at(theta: Theta, rate: float) -> float:
    """Return what a theta that is a function of the rate says, if it is a scale."""
    value = theta(rate)
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= float(value) < math.inf:
        raise ValueError(f"expected theta to return a finite number >= 0, got {value!r} for the rate {rate}")
    return float(value)

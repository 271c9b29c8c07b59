"""Checks of arguments, at the door."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

__all__ = ["instance", "integer", "real"]


def real(name: str, value: Any) -> float:
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

"""Checks of arguments, at the door."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any


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


def require_same_shapes(what: str, ours: Mapping[str, Any], theirs: Any) -> None:
    """Refuse the state of another model, by the shapes of its weights."""
    if ours != theirs:
        theirs = theirs if isinstance(theirs, Mapping) else {}
        both = {**ours, **theirs}
        name = next(n for n in both if (n in ours, ours.get(n)) != (n in theirs, theirs.get(n)))
        here, there = (shapes.get(name, "none") for shapes in (ours, theirs))
        raise ValueError(
            f"expected {what} of this model, got another's: {name} has shape {here} here and {there} there"
        )

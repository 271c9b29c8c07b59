"""Checks of arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from numbers import Integral, Real

from feather_param.utils.text import printable


def real(name: str, value: object) -> float:
    """Return a number as a float; raise a TypeError for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"expected {name} to be a number, got {value!r}")
    return float(value)


def integer(name: str, value: object, least: int) -> int:
    """Return an integer as an int; raise a TypeError for anything else, a ValueError if it is below `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        hint = "; wrap it in int(...)" if isinstance(value, float) and value >= 1.0 else ""
        raise TypeError(f"expected {name} to be an int, got {value!r}{hint}")
    if value < least:
        raise ValueError(f"expected {name} to be at least {least}, got {value}")
    return int(value)


def fraction_hint(value: float) -> str:
    """Return the end of a message for a percentage in the place of a fraction; nothing for other numbers.

    Example:
        >>> fraction_hint(95.0), fraction_hint(-1.0)
        ('; 95 % is 0.95', '')
    """
    return f"; {value:g} % is {value / 100:g}" if 1.0 < value < 100.0 else ""


def takes(function: Callable[..., object], count: int) -> bool:
    """Return whether a function can be called with a number of positional arguments.

    Example:
        >>> takes(lambda a, b: a, 2), takes(lambda a: a, 2)
        (True, False)
    """
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # some built-in functions have no signature
        return True
    return True


def instance(value: object, kind: type, source: str) -> None:
    """Raise a TypeError unless a value is of a class; the message names the `source` of such values."""
    if not isinstance(value, kind):
        raise TypeError(f"expected a {kind.__name__} from {source}, got {type(value).__name__}")


def require_same_shapes(what: str, ours: Mapping[str, object], theirs: object) -> None:
    """Raise a ValueError unless the shapes of the weights in a state are those of the model.

    Args:
        what: the kind of state, for the message.
        ours: the shapes in the model, by name.
        theirs: the shapes in the state; anything but a mapping counts as an empty one.
    """
    if ours != theirs:
        theirs = theirs if isinstance(theirs, Mapping) else {}
        both = {**ours, **theirs}
        name = next(n for n in both if (n in ours, ours.get(n)) != (n in theirs, theirs.get(n)))
        here, there = (printable(shapes.get(name, "none")) for shapes in (ours, theirs))
        raise ValueError(
            f"expected {what} of this model, got another's: {printable(name)} has shape {here} here and {there} there"
        )

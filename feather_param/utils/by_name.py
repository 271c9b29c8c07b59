"""Numbers for each of some names, given by globs, a mapping, or an object with rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any

from feather_param.utils.checks import fraction_hint, integer, real
from feather_param.utils.globs import Globs
from feather_param.utils.text import listed, printable


def checked_rates(rates: object) -> dict[str, float]:
    """Return a mapping from globs to rates, with the rates as floats. Refuse anything else."""
    if not isinstance(rates, Mapping) or not all(isinstance(glob, str) for glob in rates):
        raise TypeError(f"expected a mapping from globs to rates, got {rates!r}")
    checked = {glob: real(f"the rate of {glob!r}", rate) for glob, rate in rates.items()}
    if not checked:
        raise ValueError('expected at least one rate, got none; "*" matches all weights')
    for glob, rate in checked.items():
        if not 0.0 <= rate < 1.0:
            hint = fraction_hint(rate)
            raise ValueError(f"expected a rate, the fraction of zeros, in [0, 1), got {rate} for {glob!r}{hint}")
    return checked


def rates_by_name(rates: Mapping[str, float], weights: Iterable[str], globs: Globs) -> dict[str, float]:
    """Return the rate of each weight: that of the first glob that matches its name or the name of its module.

    Args:
        rates: the rates by glob.
        weights: the names of the weights.
        globs: the globs of `rates`.
    """
    found: dict[str, str] = {}
    for name in weights:
        matching = globs.matching((name, _module(name)))
        if not matching:
            raise ValueError(
                f'expected a rate for each weight, got none for {printable(name)}; add "*" as the last glob'
            )
        found[name] = matching[0]
    used = set(found.values())
    if unused := [glob for glob in rates if glob not in used]:
        matched = [name for name in found if fnmatchcase(name, unused[0]) or fnmatchcase(_module(name), unused[0])]
        earlier = f"only {listed(matched)}, whose rate an earlier glob gives; move it before that one"
        raise ValueError(
            f"expected each glob of per_layer to determine the rate of a weight, got {unused[0]!r}, which matches "
            + (earlier if matched else f"none of {listed([*found])}")
        )
    return {name: rates[glob] for name, glob in found.items()}


def _module(name: str) -> str:
    """Return the name of the module of a weight."""
    return name.rpartition(".")[0]


def listed_zeros(plan: Any) -> dict[str, int]:
    """Return the number of zeros by name, as a mapping or the rows of an object list it. Refuse anything else."""
    if isinstance(plan, Mapping):
        numbers = dict(plan)
    elif isinstance(getattr(plan, "rows", None), tuple):
        numbers = {row.name: row.zeros for row in plan.rows}
    else:
        raise TypeError(f"expected a Report, a Plan or a mapping from names to zeros, got {type(plan).__name__}")
    if missing := [name for name, zeros in numbers.items() if zeros is None]:
        raise ValueError(f"expected a plan with the zeros of each weight, got none for {printable(missing[0])}")
    for name, zeros in numbers.items():
        if not isinstance(zeros, Integral):
            hint = "per_layer({...}) takes rates" if isinstance(zeros, float) else "pass the report of a controller"
            raise TypeError(
                f"expected the zeros of {printable(name)} to be an int, got a {type(zeros).__name__}; {hint}"
            )
    return {name: integer(f"the zeros of {printable(name)}", zeros, 0) for name, zeros in numbers.items()}

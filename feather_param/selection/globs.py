"""Patterns on names: what they match, and what was meant by one that matches nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from feather_param.selection.names import full_name
from feather_param.selection.weights import Site, is_matrix, sites_of

Filter = str | Sequence[str] | Callable[[str, nn.Module], bool]
"""Glob patterns on names, or a predicate on (module name, module)."""


class Rule:
    """An ``include`` or ``exclude``: which sites it matches, and which of its patterns have matched any."""

    def __init__(self, rule: Any, argument: str) -> None:
        if isinstance(rule, type):
            raise TypeError(
                f"expected {argument} to be glob patterns or a predicate (name, module) -> bool, got the class "
                f"{rule.__name__}; use lambda name, module: isinstance(module, {rule.__name__})"
            )
        self._predicate = rule if callable(rule) else None
        patterns = [rule] if isinstance(rule, str) else list(rule) if isinstance(rule, Iterable) else []
        if self._predicate is None and (not patterns or not all(isinstance(pattern, str) for pattern in patterns)):
            raise TypeError(
                f"expected {argument} to be glob patterns or a predicate (name, module) -> bool, got {rule!r}"
            )
        self._argument = argument
        self._patterns = patterns
        self._unused: dict[Any, None] = dict.fromkeys([rule] if self._predicate else patterns)

    def matches(self, site: Site, aliases: list[str], default: bool) -> bool:
        """Return whether the rule matches a site, and note which patterns do."""
        if self._predicate is not None:
            found = [self._predicate] if default and any(self._predicate(name, site.module) for name in aliases) else []
        else:
            found = [pattern for pattern in self._patterns if _fits(pattern, site, aliases, default)]
        for pattern in found:
            self._unused.pop(pattern, None)
        return bool(found)

    def require_used(self, model: nn.Module) -> None:
        """Refuse a rule with a pattern that matched nothing: a typing error would prune, or spare, the wrong layer."""
        if not self._unused:
            return
        missed = ", ".join(repr(pattern) for pattern in self._unused)
        hint = "" if self._predicate else _meant(next(iter(self._unused)), model, self._argument)
        layers = [site.name for site, _ in sites_of(model) if site.by_default][:3]
        hint = hint or (
            f"some of this model's names: {', '.join(layers)}" if layers else "this model has no such layer"
        )
        raise ValueError(f"expected {self._argument} to match a weight, got {missed}, which matches none; {hint}")


def _fits(pattern: str, site: Site, aliases: list[str], default: bool) -> bool:
    last = pattern.rpartition(".")[2]
    by_name = is_matrix(site.parameter) and last.strip("*?") and fnmatchcase(site.tensor, last)
    for name in aliases:
        if fnmatchcase(full_name(name, site.tensor), pattern) and (default or by_name):
            return True
        if default and fnmatchcase(name, pattern):
            return True
    return False


def _meant(pattern: str, model: nn.Module, argument: str) -> str:
    """Return what may have been meant by a pattern that matches no weight; "" if nothing is like it."""
    sites = list(sites_of(model))
    for other in (f"{pattern}.*", pattern.removeprefix("*."), f"*.{pattern}", f"*.{pattern}.*"):
        if any(_fits(other, site, aliases, site.by_default) for site, aliases in sites):
            return f"did you mean {other!r}?"
    named = [(site, aliases) for site, aliases in sites if _names(pattern, site, aliases) and not site.by_default]
    for site, aliases in named:
        if not is_matrix(site.parameter):
            continue
        what = f"{aliases[0] or 'the model'!r} is of type {type(site.module).__name__}"
        if argument != "include":
            return f"{what}, which stays dense unless include names it"
        ours = [(other, names) for other, names in sites if other.module is site.module and is_matrix(other.parameter)]
        return f"{what}, whose weights join only by their own names: include={_by_name(pattern, ours)}"
    if any(site.parameter is not None for site, _ in named):
        return f"{named[0][0].name!r} has fewer than two dimensions, and such Parameters (biases, norms) stay dense"
    return ""


def _names(pattern: str, site: Site, aliases: list[str]) -> bool:
    names = [at for name in aliases for at in (name, full_name(name, site.tensor))]
    return any(fnmatchcase(at, pattern) or fnmatchcase(at, f"*.{pattern}") for at in names)


def _by_name(pattern: str, sites: list[tuple[Site, list[str]]]) -> str:
    """Return a pattern like this one that matches all these tensors of one module, or else their names."""
    tensors = [site.tensor for site, _ in sites]
    last = tensors[0] if len(tensors) == 1 else os.path.commonprefix(tensors) + "*"  # noqa: RUF071 # of the names
    for stem in (pattern, pattern.removesuffix(".*"), f"*.{pattern}"):
        if all(_fits(f"{stem}.{last}", site, aliases, False) for site, aliases in sites):
            return repr(f"{stem}.{last}")
    return repr([site.name for site, _ in sites])

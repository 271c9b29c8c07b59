"""The ``include`` and ``exclude`` arguments: globs on names, and hints for globs that match nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from feather_param.selection.names import full_name
from feather_param.selection.weights import Place, is_matrix, places_of
from feather_param.utils.globs import Globs
from feather_param.utils.text import listed, printable

Filter = str | Sequence[str] | Callable[[str, nn.Module], bool]
"""Globs on names, or a predicate ``(module name, module) -> bool``."""


class Rule:
    """An ``include`` or ``exclude`` argument, and those of its globs that have matched nothing yet.

    Args:
        rule: a glob, several, or a predicate.
        argument: name of the argument, for messages.

    Raises:
        TypeError: the rule is something else.
    """

    def __init__(self, rule: object, argument: str) -> None:
        if isinstance(rule, type):
            raise TypeError(
                f"expected {argument} to be globs or a predicate (name, module) -> bool, got the class "
                f"{rule.__name__}; use lambda name, module: isinstance(module, {rule.__name__})"
            )
        self._predicate = rule if callable(rule) else None
        globs = [rule] if isinstance(rule, str) else list(rule) if isinstance(rule, Iterable) else []
        if self._predicate is None and (not globs or not all(isinstance(glob, str) for glob in globs)):
            raise TypeError(f"expected {argument} to be globs or a predicate (name, module) -> bool, got {rule!r}")
        self._argument = argument
        self._globs = Globs(globs)
        self._unused: dict[Any, None] = dict.fromkeys([rule] if self._predicate else globs)

    def matches(self, place: Place, aliases: list[str], default: bool) -> bool:
        """Return whether the rule matches a place.

        Args:
            place: the place.
            aliases: all names of its module.
            default: whether a glob on the module's name or a predicate can match. If False, only a glob on the
                tensor's name can.
        """
        if self._predicate is not None:
            matched = default and any(self._predicate(name, place.module) for name in aliases)
            found = [self._predicate] if matched else []
        else:
            candidates = self._globs.matching([*aliases, *(full_name(name, place.tensor) for name in aliases)])
            found = [glob for glob in candidates if _matches(glob, place, aliases, default)]
        for each in found:
            self._unused.pop(each, None)
        return bool(found)

    def require_used(self, model: nn.Module) -> None:
        """Refuse a rule with a glob that matched nothing: it is probably misspelt.

        Raises:
            ValueError: a glob, or the predicate, matched nothing. The message proposes a correction.
        """
        if not self._unused:
            return
        missed = listed([repr(each) for each in self._unused])
        hint = "" if self._predicate else _correction(next(iter(self._unused)), model, self._argument)
        layers = [place.name for place, _ in places_of(model) if place.by_default][:3]
        hint = hint or (f"some of this model's names: {listed(layers)}" if layers else "this model has no such layer")
        raise ValueError(
            f"expected {self._argument} to match a weight, got {missed}, which matches none; {printable(hint)}"
        )


def _matches(glob: str, place: Place, aliases: list[str], default: bool) -> bool:
    last = glob.rpartition(".")[2]
    by_tensor = is_matrix(place.parameter) and last.strip("*?") and fnmatchcase(place.tensor, last)
    for name in aliases:
        if fnmatchcase(full_name(name, place.tensor), glob) and (default or by_tensor):
            return True
        if default and fnmatchcase(name, glob):
            return True
    return False


def _correction(glob: str, model: nn.Module, argument: str) -> str:
    """Return a hint for a glob that matches no weight, or "" if no name is similar."""
    places = list(places_of(model))
    for other in (f"{glob}.*", glob.removeprefix("*."), f"*.{glob}", f"*.{glob}.*"):
        if any(_matches(other, place, aliases, place.by_default) for place, aliases in places):
            return f"did you mean {other!r}?"
    named = [(place, aliases) for place, aliases in places if _refers_to(glob, place, aliases) and not place.by_default]
    for place, aliases in named:
        if not is_matrix(place.parameter):
            continue
        what = f"{aliases[0] or 'the model'!r} is of type {type(place.module).__name__}"
        if argument != "include":
            return f"{what}, which stays dense unless include names it"
        own = [(other, names) for other, names in places if other.module is place.module and is_matrix(other.parameter)]
        return f"{what}, whose weights are pruned only if include names them: include={_glob_for_tensors(glob, own)}"
    if any(place.parameter is not None for place, _ in named):
        return f"{named[0][0].name!r} has fewer than two dimensions, and such Parameters (biases, norms) stay dense"
    return ""


def _refers_to(glob: str, place: Place, aliases: list[str]) -> bool:
    """Return whether a glob matches the name of a place or of its module.

    A glob may leave out leading parts of the name.
    """
    names = [name for alias in aliases for name in (alias, full_name(alias, place.tensor))]
    return any(fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}") for name in names)


def _glob_for_tensors(glob: str, places: list[tuple[Place, list[str]]]) -> str:
    """Return a glob that matches these tensors of one module, or a list of their names."""
    tensors = [place.tensor for place, _ in places]
    last = tensors[0] if len(tensors) == 1 else os.path.commonprefix(tensors) + "*"  # noqa: RUF071 # of the names
    for stem in (glob, glob.removesuffix(".*"), f"*.{glob}"):
        if all(_matches(f"{stem}.{last}", place, aliases, False) for place, aliases in places):
            return repr(f"{stem}.{last}")
    return repr([place.name for place, _ in places])

"""Globs on names: find those that match a name without trying all of them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable


class Globs:
    """A list of globs that can be searched fast, also if there is one for each of thousands of names.

    Only globs whose text before the first wildcard is the beginning of a name are compared with it. The result is that
    of `fnmatch.fnmatchcase`.

    Example:
        >>> Globs(["head.*", "0.weight", "*.weight"]).matching(["0.weight"])
        ['0.weight', '*.weight']
    """

    def __init__(self, globs: Iterable[str]) -> None:
        self._order: dict[str, int] = {}
        self._by_start: dict[str, list[tuple[str, Callable[[str], object]]]] = {}
        for glob in dict.fromkeys(globs):
            self._order[glob] = len(self._order)
            start = re.split(r"[*?[]", glob, maxsplit=1)[0]
            matches = glob.__eq__ if start == glob else re.compile(fnmatch.translate(glob)).match
            self._by_start.setdefault(start, []).append((glob, matches))
        self._lengths = sorted({len(start) for start in self._by_start})

    def matching(self, names: Iterable[str]) -> list[str]:
        """Return the globs that match at least one of some names, in the order of the list."""
        found: set[str] = set()
        for name in names:
            for length in self._lengths:
                if length > len(name):
                    break
                found.update(glob for glob, matches in self._by_start.get(name[:length], ()) if matches(name))
        return sorted(found, key=self._order.__getitem__)

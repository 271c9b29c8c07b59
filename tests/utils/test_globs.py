"""Globs are found as `fnmatch` finds them."""

from __future__ import annotations

import fnmatch
import random

from feather_param.utils.globs import Globs


def test_random_globs_match_the_names_that_fnmatch_matches():
    generator = random.Random(1)

    def text(letters: str) -> str:
        return "".join(generator.choice(letters) for _ in range(generator.randint(0, 5)))

    for _ in range(2000):
        globs = [text("ab.*?[]!-\n") for _ in range(generator.randint(1, 4))]
        names = [text("ab.[]*!\n") for _ in range(2)]
        wanted = [glob for glob in dict.fromkeys(globs) if any(fnmatch.fnmatchcase(name, glob) for name in names)]
        assert Globs(globs).matching(names) == wanted

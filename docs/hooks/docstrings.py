"""An extension of griffe, which reads the docstrings for the site.

The docstrings say ``Example:``. griffe knows ``Examples:`` only. Markdown takes the prompts ``>>>`` for quotations, so
examples outside of such a section become blocks of code.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_PROMPTS = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class Examples(Extension):
    """Show all examples of docstrings as code."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = _EXAMPLE.sub("Examples:", obj.docstring.value)
            obj.docstring.value = _PROMPTS.sub(r"```pycon\n\g<0>\n```", text)

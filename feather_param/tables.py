"""Readable tables of text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned"]


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of cells as columns: the first two to the left, for names and shapes, the others to the right.

    Example:
        >>> print(*aligned([("name", "shape", "n"), ("fc", "4", "12")]), sep=chr(10))
        name  shape   n
        fc    4      12
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]

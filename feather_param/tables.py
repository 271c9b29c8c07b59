"""Readable tables of text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned", "percent", "short"]


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


def percent(fraction: float) -> str:
    """Return a fraction in percent, with a digit more where it is small; only 0 reads 0.0 %.

    Example:
        >>> percent(0.5), percent(0.0123), percent(0.0012), percent(1e-7), percent(0.0)
        ('50.0%', '1.2%', '0.12%', '<0.01%', '0.0%')
    """
    if 0 < fraction < 0.0001:
        return "<0.01%"
    return f"{fraction:.2%}" if 0 < fraction < 0.00995 else f"{fraction:.1%}"


def short(count: int) -> str:
    """Return a number of three digits with a unit's prefix.

    Example:
        >>> short(640), short(1_280), short(589_824), short(4_089_184_256)
        ('640', '1.28k', '590k', '4.09G')
    """
    if count < 1000:
        return str(count)
    power = min(5, (len(f"{float(f'{count:.3g}'):.0f}") - 1) // 3)  # 999,999 is 1.00M
    return f"{count / 1000**power:#.3g}".rstrip(".") + "kMGTP"[power - 1]

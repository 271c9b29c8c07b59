"""Text for tables and messages: columns, numbers, names that are safe to show, and groups of names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LONGEST_MESSAGE = 2000  # characters of an error or a warning, and of a list of names to copy from it


def printable(value: object, most: int = 400) -> str:
    r"""Return a value as text that is safe to show: one line of printable characters, at most ``most`` of them.

    Names from files and models may hold any character. A character that is not printable (`str.isprintable`) becomes
    its escape: newlines, codes that control a terminal, invisible characters, those that change the direction of the
    text, and lone surrogates. A backslash stays as it is, so text that is escaped already does not change. The middle
    of a longer text becomes an ellipsis.

    Example:
        >>> print(printable("fc\x1b[2J.weight\n"), printable("Gewicht_ä"), printable("a" * 10**6, most=9))
        fc\x1b[2J.weight\n Gewicht_ä aaa…aaaa
    """
    text = str(value)
    text = text if len(text) <= 2 * most else text[:most] + text[-most:]  # an escape has more than one character
    if not text.isprintable():
        text = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    half = most // 2
    return text if len(text) <= most else f"{text[: half - 1]}…{text[-half:]}"


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of `printable` cells with aligned columns: the first two to the left, the others to the right.

    Example:
        >>> print(*aligned([("name", "shape", "n"), ("fc", "4", "12")]), sep=chr(10))
        name  shape   n
        fc    4      12
    """
    lines = [[printable(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def percent(fraction: float) -> str:
    """Format a fraction in percent, with one more digit if it is small. Only 0 is shown as 0.0%.

    Example:
        >>> percent(0.5), percent(0.0123), percent(0.0012), percent(1e-7), percent(0.0)
        ('50.0%', '1.2%', '0.12%', '<0.01%', '0.0%')
    """
    if 0 < fraction < 0.0001:
        return "<0.01%"
    return f"{fraction:.2%}" if 0 < fraction < 0.00995 else f"{fraction:.1%}"


def ratio(value: float) -> str:
    """Format a ratio so that 1 can be told from less: below 1 with two digits, rounded down. Only 0 is shown as 0.

    Example:
        >>> ratio(12.34), ratio(1.0), ratio(0.999), ratio(0.3), ratio(0.001), ratio(0)
        ('12.3', '1.0', '0.99', '0.30', '<0.01', '0')
    """
    if value >= 1:
        return f"{value:,.1f}"
    if value < 0.01:
        return "<0.01" if value > 0 else "0"
    return f"{math.floor(100 * value + 1e-9) / 100:.2f}"


def short(count: int) -> str:
    """Format a count with three significant digits and an SI prefix.

    Example:
        >>> short(640), short(1_280), short(589_824), short(4_089_184_256)
        ('640', '1.28k', '590k', '4.09G')
    """
    if count < 1000:
        return str(count)
    power = min(5, (len(f"{float(f'{count:.3g}'):.0f}") - 1) // 3)  # 999,999 is 1.00M
    return f"{count / 1000**power:#.3g}".rstrip(".") + "kMGTP"[power - 1]


def listed(names: Sequence[str], most: int = 8) -> str:
    """Return `printable` names with commas between them. Of more than ``most`` names, return the first.

    Example:
        >>> listed(["a", "b", "c", "d"], most=2)
        'a, b and 2 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more


def grouped(reasons: Mapping[str, str]) -> list[str]:
    """Return `printable` lines of names with reasons. Names that differ only in a running number are put on one line.

    Longer numbers than nine digits, and numbers after the eighth of a name, do not count: the time is linear.

    Example:
        >>> grouped({"0.fc": "excluded", "1.fc": "excluded", "2.fc": "excluded", "head": "tied to 0.fc"})
        ['0..2.fc (3 weights: excluded)', 'head (tied to 0.fc)']
    """
    lines = [(_NUMBER.split(name, maxsplit=8), reason, 1) for name, reason in reasons.items()]
    length = max((len(parts) for parts, _, _ in lines), default=0)
    for index in reversed(range(1, length, 2)):
        lines = _merged(lines, index)
    return [
        f"{printable(''.join(parts))} ({printable(reason if count == 1 else f'{count} weights: {reason}')})"
        for parts, reason, count in lines
    ]


_NUMBER = re.compile(r"(?<![0-9])([0-9]{1,9})(?![0-9])")
# A name split at its numbers, which have the odd indices; the reason; the number of names it represents.
_Line = tuple[list[str], str, int]


def _merged(lines: Sequence[_Line], index: int) -> list[_Line]:
    """Merge lines that differ only in the number at an index, if these are at least three consecutive numbers."""
    alike: dict[object, list[_Line]] = {}
    for line in lines:
        parts, reason, count = line
        single = len(parts) > index and parts[index].isdecimal()
        key = (*parts[:index], None, *parts[index + 1 :], reason, count) if single else (*parts, reason, count)
        alike.setdefault(key, []).append(line)
    merged: list[_Line] = []
    for group in alike.values():
        parts, reason, count = group[0]
        numbers = [line[0][index] for line in group] if len(group) > 2 else []
        if numbers and numbers == [str(int(numbers[0]) + i) for i in range(len(numbers))]:
            run = f"{numbers[0]}..{numbers[-1]}"
            merged.append(([*parts[:index], run, *parts[index + 1 :]], reason, count * len(group)))
        else:
            merged += group
    return merged


def described(allocation: str, pattern: str) -> list[str]:
    """Return the lines that name the allocation and the pattern of a report, where they are not the defaults.

    Example:
        >>> described("erk", "n_m(2, 4)"), described("global_magnitude", "elements")
        (['allocation: erk', 'pattern: n_m(2, 4)'], [])
    """
    lines = [f"allocation: {allocation}"] if allocation != "global_magnitude" else []
    return lines + ([f"pattern: {pattern}"] if pattern != "elements" else [])


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function, or of the class of another callable object.

    Example:
        >>> from functools import partial
        >>> name_of(short), name_of(partial(short, 1))
        ('short', 'partial')
    """
    return getattr(function, "__name__", type(function).__name__)

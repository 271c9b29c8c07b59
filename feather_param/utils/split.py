"""A whole number, split in proportion to ratios."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Mapping
from fractions import Fraction


def split(total: int, ratios: Mapping[str, float], least: Mapping[str, int], most: Mapping[str, int]) -> dict[str, int]:
    """Split a whole number into whole parts in proportion to ratios, each part within its bounds.

    ``part_i = min(max(round(c * ratio_i), least_i), most_i)``, with one number c for all parts, for which they add up
    to the total. Where no c does, because several parts would grow at once, the first ones in the order of the mapping
    grow. A part with the ratio 0 is ``least_i``.

    No part shrinks when the total grows. (This is Webster's method. The largest remainders do not have this property.)

    Args:
        total: the number to split.
        ratios: numbers >= 0 by name.
        least: smallest value of each part.
        most: largest value of each part.

    Raises:
        ValueError: the bounds leave no room for the total.

    Example:
        >>> split(10, {"a": 1.0, "b": 2.0, "c": 2.0}, {"a": 0, "b": 0, "c": 0}, {"a": 9, "b": 3, "c": 9})
        {'a': 2, 'b': 3, 'c': 5}
    """
    growing = [name for name, ratio in ratios.items() if ratio > 0]
    parts = dict(least)
    room = sum(most[name] - least[name] for name in growing)
    missing = total - sum(least.values())
    if not 0 <= missing <= room:
        raise ValueError(f"expected a total from {total - missing} to {total - missing + room}, got {total}")
    if not 0 < missing < room:
        return {**parts, **{name: most[name] for name in growing}} if missing else parts
    # Whole numbers in the same proportion: rounding errors would change the order in which parts grow.
    scale = max(ratios[name].as_integer_ratio()[1] for name in growing)
    whole = {name: int(Fraction(ratios[name]) * scale) for name in growing}
    to_grow = missing + sum(least[name] for name in growing)
    c, divisor = (Fraction(_factor(to_grow, growing, ratios, least, most)) / scale).as_integer_ratio()
    for name in growing:
        rounded = (2 * c * whole[name] + divisor) // (2 * divisor)
        parts[name] = min(max(rounded, least[name]), most[name])
    _correct(parts, total, whole, least, most)
    return parts


def _factor(
    total: int,
    names: list[str],
    ratios: Mapping[str, float],
    least: Mapping[str, int],
    most: Mapping[str, int],
) -> float:
    """Return c for which the parts add up to the total before they are rounded."""

    def unrounded(c: float) -> float:
        return sum(min(max(c * ratios[name], least[name]), most[name]) for name in names)

    # Between two of these points, the sum is linear in c.
    points = sorted({bound[name] / ratios[name] for name in names for bound in (least, most)})
    at = min(max(bisect_left(points, total, key=unrounded), 1), len(points) - 1)
    low, high = points[at - 1], points[at]
    slope = (unrounded(high) - unrounded(low)) / (high - low)
    return low + (total - unrounded(low)) / slope if slope > 0 else low


def _correct(
    parts: dict[str, int],
    total: int,
    ratios: Mapping[str, int],
    least: Mapping[str, int],
    most: Mapping[str, int],
) -> None:
    """Let parts grow or shrink by one until they add up to the total.

    A part grows from x to x + 1 where ``c * ratio`` is x + 1/2: the parts grow in the order of these c.
    """
    names = list(ratios)
    missing = total - sum(parts.values())
    sign, bound = (1, most) if missing > 0 else (-1, least)

    def entry(index: int) -> tuple[Fraction, int]:
        name = names[index]
        return Fraction(sign * (2 * parts[name] + sign), 2 * ratios[name]), sign * index

    heap = [entry(index) for index, name in enumerate(names) if parts[name] != bound[name]]
    heapq.heapify(heap)
    for _ in range(abs(missing)):
        _, signed = heapq.heappop(heap)
        index = sign * signed
        parts[names[index]] += sign
        if parts[names[index]] != bound[names[index]]:
            heapq.heappush(heap, entry(index))

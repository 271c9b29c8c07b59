"""Line charts as inline SVG, for pages that need nothing but themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Line", "line_chart", "sparkline", "ticks"]

_WIDTH, _HEIGHT = 380, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 26, 34  # margins
_MOST_POINTS = 400  # of a line: more than there are pixels to tell them apart


@dataclass(frozen=True)
class Line:
    """The points of a line, its colour (CSS) and what it shows; a line without points is left out."""

    label: str
    color: str
    xs: Sequence[float]
    ys: Sequence[float]


def ticks(most: float, count: int = 5) -> list[float]:
    """Return about so many round numbers from 0 up to at least ``most``: steps of 1, 2 or 5 times a power of ten.

    Example:
        >>> ticks(0.87), ticks(1200), ticks(0)
        ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 500.0, 1000.0, 1500.0], [0.0, 0.5, 1.0])
    """
    if not 1e-300 < most < math.inf:
        return [0.0, 0.5, 1.0]
    power = 10.0 ** math.floor(math.log10(most / count))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power * count >= most * 0.999)
    return [float(f"{i * step:.6g}") for i in range(math.ceil(most / step * 0.999999) + 1)]


def line_chart(title: str, lines: Sequence[Line], format_y: Callable[[float], str], most_y: float = 0.0) -> str:
    """Return a chart over optimizer steps, both axes from 0.

    Args:
        title: what the y axis shows.
        lines: the lines, of which those with a label are named in a legend.
        format_y: makes the labels of the y axis.
        most_y: what the y axis reaches to at least.

    Example:
        >>> chart = line_chart("rate", [Line("", "black", [0, 10], [0.0, 0.9])], "{:.0%}".format, most_y=1.0)
        >>> chart.startswith("<svg"), "polyline" in chart, "100%" in chart
        (True, True, True)
    """
    lines = [line for line in lines if line.xs]
    x_ticks = ticks(max((max(line.xs) for line in lines), default=0.0))
    y_ticks = ticks(max([most_y, *(max(line.ys) for line in lines)]))
    most_x = max((max(line.xs) for line in lines), default=0.0) or x_ticks[-1]

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * value / most_x

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / y_ticks[-1]

    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text class="title" x="0" y="12">{escape(title)}</text>')
    for value in y_ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y(value):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 6}" y="{y(value) + 4:.1f}">{escape(format_y(value))}</text>')
    for value in x_ticks:
        if value <= most_x * 1.001 and value == int(value):
            parts.append(f'<text class="x" x="{x(value):.1f}" y="{_HEIGHT - _BOTTOM + 16}">{int(value):,}</text>')
    parts.append(f'<text class="x" x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 2}">optimizer step</text>')
    legend = _WIDTH - _RIGHT
    for line in lines:
        points = [(x(a), y(b)) for a, b in zip(_thinned(line.xs), _thinned(line.ys), strict=True)]
        parts.append(f'<polyline stroke="{line.color}" points="{_join(points)}"/>')
        if len(points) <= 30:
            parts += [f'<circle fill="{line.color}" cx="{a:.1f}" cy="{b:.1f}" r="2"/>' for a, b in points]
    for line in reversed(lines):
        if line.label:
            parts.append(
                f'<text class="legend" style="fill:{line.color}" x="{legend}" y="12">{escape(line.label)}</text>'
            )
            legend -= 8 * len(line.label) + 10
    return "".join([*parts, "</svg>"])


def sparkline(ys: Sequence[float], label: str) -> str:
    """Return a line as small as a word, from 0 to 1.

    Example:
        >>> sparkline([1.0, 0.5], "half is left").count("polyline")
        1
    """
    ys = _thinned(ys)
    points = [(100.0 * i / max(1, len(ys) - 1), 19.0 - 18.0 * value) for i, value in enumerate(ys)]
    return (
        f'<svg class="spark" viewBox="0 0 100 20" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f'<polyline points="{_join(points)}"/></svg>'
    )


def _thinned(values: Sequence[float]) -> Sequence[float]:
    """Return every so many-th value, and the last."""
    stride = -(-len(values) // _MOST_POINTS)
    return values if stride <= 1 else [*values[:-1:stride], values[-1]]


def _join(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)

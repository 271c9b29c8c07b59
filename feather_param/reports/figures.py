"""Draw reports as one matplotlib figure (``pip install 'feather_param[plot]'``)."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from feather_param.reports.history import History, Record
from feather_param.reports.multiply_adds import MultiplyAdds
from feather_param.reports.report import Report
from feather_param.utils.checks import instance, real
from feather_param.utils.extras import extra
from feather_param.utils.text import percent, printable, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Accuracy", "draw", "svg"]

Accuracy = Mapping[str, Sequence[tuple[int, float]]]
"""The test accuracy of runs by their name: pairs of an optimizer step and a fraction from 0 to 1."""

_BLUE, _ORANGE, _GREY, _PALE, _INK = "#2b6cb0", "#c05621", "#718096", "#e2e8f0", "#2d3748"
_CURVES = (_GREY, _BLUE, _ORANGE, "#2f855a", "#6b46c1", "#b83280")
_NARROW, _WIDE = 7.5, 13.0  # inches
_CURVES_HEIGHT, _ROW, _AROUND = 2.9, 0.2, 1.0  # inches: the curves, a layer, the axis below the layers
_FEWEST_ROWS = 5  # least height of a panel in rows: without it, a single bar would fill the panel
_MOST_ROWS = 250  # more layers are drawn as thin bars without names and numbers
_THIN_ROWS = 60  # height in rows of a panel of thin bars
_LONGEST_NAME = 48  # characters


def draw(
    report: Report | None = None,
    *,
    history: History | None = None,
    multiply_adds: MultiplyAdds | None = None,
    accuracy: Accuracy | None = None,
    title: str = "",
) -> Figure:
    """Draw survivors, history, multiply-adds and test accuracy as panels of one figure.

    The panels with curves are at the top. The panels with a bar for each layer are below them. More than 250 layers are
    drawn without their names.

    Args:
        report: the survivors of each layer, from `Controller.report`.
        history: rate, threshold and churn over the steps. It is drawn if it has at least two records.
        multiply_adds: the remaining multiply-adds of each layer.
        accuracy: the test accuracy over the steps. Each name has a curve of (optimizer step, fraction) pairs.
        title: the title of the figure.

    Returns:
        A figure that pyplot does not manage and that opens no window. ``figure.savefig("report.png")`` writes it.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: there is neither a report nor an accuracy, a curve has no points, or an accuracy is not in [0, 1].
        ImportError: matplotlib is not installed: ``pip install feather_param[plot]``.

    Example:
        >>> controller = feather_param.sparsify(nn.Linear(4, 4), final_rate=0.75, total_steps=1, end_step=0)
        >>> figure = draw(controller.report(), accuracy={"sparse": [(1, 0.5), (2, 0.75)]}, title="a small layer")
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['optimizer step', 'survivors of each layer (dashed: all layers, 25.0%)']
    """
    curves = _checked_curves(report, history, multiply_adds, accuracy)
    records = records_to_show(history)
    columns = bool(curves) + 3 * bool(records)
    bars = (report is not None) + (multiply_adds is not None)
    rows = max(_FEWEST_ROWS, len(report.rows) if report else 0, len(multiply_adds.rows) if multiply_adds else 0)
    heights = [_CURVES_HEIGHT] * bool(columns) + [_AROUND + _ROW * (rows if rows <= _MOST_ROWS else _THIN_ROWS)] * bool(
        bars
    )
    width = _WIDE if columns > 1 or bars > 1 else _NARROW
    heading = textwrap.fill(printable(title), int(8 * width))
    above = 0.3 * (heading.count("\n") + 1) if heading else 0.0
    figure = extra("matplotlib.figure").Figure(figsize=(width, sum(heights) + above), dpi=120, layout="constrained")
    extra("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.04)
    if heading:
        figure.suptitle(heading, fontsize=13, fontweight="bold", parse_math=False)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    if columns:
        panels = list(figure.add_subfigure(grid[0]).subplots(1, columns, squeeze=False)[0])
        if curves:
            _draw_accuracy(panels.pop(0), curves)
        if records:
            _draw_history(panels, records)
    if bars:
        panels = list(figure.add_subfigure(grid[-1]).subplots(1, bars, squeeze=False)[0])
        if report is not None:
            _draw_survivors(panels.pop(0), report)
        if multiply_adds is not None:
            names = [row.name for row in report.rows] if report is not None else []
            _draw_multiply_adds(panels.pop(0), multiply_adds, named=names != [row.name for row in multiply_adds.rows])
    return figure


def svg(figure: Figure) -> str:
    """Return a figure as an SVG element for an HTML page.

    Equal figures give equal elements. The element loads no other files. Its labels are text, not paths.
    """
    file = io.StringIO()
    style = extra("matplotlib.style").context({"svg.fonttype": "none", "svg.hashsalt": "feather_param"})
    with style, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser draws the text with its fonts
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return file.getvalue()[file.getvalue().index("<svg") :]


def records_to_show(history: History | None) -> list[Record]:
    """Return the records of a history if there are two or more: one alone shows no change."""
    return history.records if history is not None and len(history.records) > 1 else []


def _checked_curves(report: Any, history: Any, multiply_adds: Any, accuracy: Any) -> dict[str, list[tuple[int, float]]]:
    """Check the arguments of `draw`, and return the curves of the accuracy as lists by name."""
    if report is None and accuracy is None:
        raise ValueError("expected a report or an accuracy to draw, got neither; pass controller.report()")
    for value, kind, source in (
        (report, Report, "controller.report()"),
        (history, History, "History(controller)"),
        (multiply_adds, MultiplyAdds, "multiply_adds(model, input)"),
    ):
        if value is not None:
            instance(value, kind, source)
    if accuracy is None:
        return {}
    if not isinstance(accuracy, Mapping):
        raise TypeError(f"expected accuracy to map names to (step, fraction) pairs, got {type(accuracy).__name__}")
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, points in accuracy.items():
        shown = printable(name)
        curves[str(name)] = [(step, real(f"the accuracy of {shown}", value)) for step, value in points]
        if not curves[str(name)]:
            raise ValueError(f"expected (step, fraction) pairs for {shown}, got none")
        for step, value in curves[str(name)]:
            if not 0 <= value <= 1:
                raise ValueError(f"expected the accuracy of {shown} as a fraction from 0 to 1, got {value} at {step}")
    return curves


def _draw_accuracy(axes: Axes, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    colors = _CURVES if len(curves) > 1 else (_BLUE,)
    lines: list[Any] = []
    for i, points in enumerate(curves.values()):
        steps, values = zip(*points, strict=True)
        style: dict[str, Any] = {"marker": "o" if len(points) <= 20 else None, "markersize": 3}
        lines += axes.plot(steps, values, color=colors[i % len(colors)], **style)
    axes.set_ylabel("test accuracy")
    axes.yaxis.set_major_formatter(_percents())
    _legend(axes, lines, [f"{printable(name, _LONGEST_NAME)}: {points[-1][1]:.2%}" for name, points in curves.items()])
    _over_steps(axes)


def _draw_history(panels: Sequence[Axes], records: Sequence[Record]) -> None:
    rate, threshold, churn = panels
    steps = [record.step for record in records]
    style: dict[str, Any] = {"marker": "o" if len(steps) <= 20 else None, "markersize": 3}
    rate.plot(steps, [record.rate for record in records], color=_ORANGE, **style)
    rate.set_ylabel("rate (zeros)")
    rate.set_ylim(0, 1)
    rate.yaxis.set_major_formatter(_percents())
    threshold.plot(steps, [record.threshold for record in records], color=_GREY, **style)
    threshold.set_ylabel("threshold")
    left = [record.left / max(1, record.survivors) for record in records[1:]]
    entered = [record.entered / max(1, record.survivors) for record in records[1:]]
    lines = churn.plot(steps[1:], left, color=_GREY, **style) + churn.plot(steps[1:], entered, color=_BLUE, **style)
    churn.set_ylabel("churn (of survivors)")
    churn.yaxis.set_major_formatter(_percents())
    _legend(churn, lines, ["left", "entered"])
    for axes in panels:
        axes.set_ylim(bottom=0)
        _over_steps(axes)


def _draw_survivors(axes: Axes, report: Report) -> None:
    """Draw the fraction of survivors of each layer, with their number beside it. That of a dead layer is orange."""
    fractions = [row.survivors / max(1, row.total) for row in report.rows]
    overall = report.survivors / max(1, report.total)
    longest = max(fractions, default=0.0) or 1.0
    _bars(axes, fractions, _BLUE)
    _layers(axes, [row.name for row in report.rows])
    if len(fractions) <= _MOST_ROWS:
        for i, (fraction, row) in enumerate(zip(fractions, report.rows, strict=True)):
            label = f"{percent(fraction)}  ({row.survivors:,} of {row.total:,})"
            at = max(fraction, overall) + 0.01 * longest  # right of the dashed line
            axes.text(at, i, label, va="center", fontsize=7, color=_INK if fraction else _ORANGE)
    axes.set_xlim(0, 1.45 * longest)  # room for the labels
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= longest])
    axes.xaxis.set_major_formatter(_percents())
    axes.axvline(overall, color=_GREY, linewidth=1, linestyle="--")
    axes.set_xlabel(f"survivors of each layer (dashed: all layers, {percent(overall)})")


def _draw_multiply_adds(axes: Axes, counted: MultiplyAdds, named: bool) -> None:
    dense = [row.dense for row in counted.rows]
    longest = max(dense, default=0) or 1
    _bars(axes, dense, _PALE)
    _bars(axes, [row.remaining for row in counted.rows], _BLUE)
    _layers(axes, [row.name if named else "" for row in counted.rows])
    if len(dense) <= _MOST_ROWS:
        for i, row in enumerate(counted.rows):
            label = f"{percent(row.remaining / max(1, row.dense))}  ({short(row.remaining)} of {short(row.dense)})"
            axes.text(row.dense + 0.01 * longest, i, label, va="center", fontsize=7, color=_INK)
    axes.set_xlim(0, 1.45 * longest)  # room for the labels
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= longest])
    axes.xaxis.set_major_formatter(extra("matplotlib.ticker").EngFormatter(sep=""))
    total = f"{percent(counted.remaining / max(1, counted.dense))} of {short(counted.dense)}"
    axes.set_xlabel(f"multiply-adds of each layer (dark: remaining, {total})")


def _layers(axes: Axes, names: Sequence[str]) -> None:
    """Set up the vertical axis of a panel with a bar for each layer, the first one at the top."""
    if len(names) > _MOST_ROWS:
        axes.set_ylabel("layer")
    else:
        labels = [printable(name.removesuffix(".weight"), _LONGEST_NAME) for name in names]
        axes.set_yticks(range(len(names)), labels, fontsize=8, parse_math=False)
    axes.set_ylim(max(_FEWEST_ROWS, len(names)) - 0.4, -0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _bars(axes: Axes, lengths: Sequence[float], color: str) -> None:
    """Draw horizontal bars. Thin ones touch each other, because gaps would look like stripes, and are one shape.

    matplotlib needs half a millisecond for each shape.
    """
    if len(lengths) <= _MOST_ROWS:
        axes.barh(range(len(lengths)), lengths, color=color, height=0.72, linewidth=0)
        return
    edges = [i - 0.5 for i in range(len(lengths) + 1)]
    axes.fill_betweenx(edges, [*lengths, lengths[-1]], step="post", color=color, linewidth=0)


def _over_steps(axes: Axes) -> None:
    """Set up a panel with curves over the optimizer steps."""
    ticker = extra("matplotlib.ticker")
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color=_PALE, linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(axes: Axes, lines: Sequence[Any], labels: Sequence[str]) -> None:
    legend = axes.legend(lines, ["-"] * len(lines), frameon=False, fontsize=9)
    for text, label in zip(legend.get_texts(), labels, strict=True):  # legend() would omit a label like "_name"
        text.set_parse_math(False)
        text.set_text(label)


def _percents() -> Any:
    return extra("matplotlib.ticker").PercentFormatter(1.0, decimals=None)

"""Reports as a matplotlib figure (``pip install 'feather_param[plot]'``)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from feather_param.reports.history import History
from feather_param.reports.multiply_adds import MultiplyAdds
from feather_param.reports.report import Report
from feather_param.utils.checks import instance
from feather_param.utils.extras import extra
from feather_param.utils.text import percent, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["draw", "draw_survivors", "history_svg"]

_BLUE, _ORANGE, _GREY, _PALE, _INK = "#2b6cb0", "#c05621", "#718096", "#e2e8f0", "#2d3748"
_HISTORY_WIDTH, _HISTORY_HEIGHT = 5.5, 6.0  # inches
_FEWEST_ROWS = 8  # that there is room for, lest the only bar be a block


def draw(
    report: Report, *, history: History | None = None, multiply_adds: MultiplyAdds | None = None, title: str = ""
) -> Figure:
    """Draw which weights survive, layer by layer, and, where given, how it came about and what it could save.

    Args:
        report: what `Controller.report` returned.
        history: adds rate, threshold and churn over the steps, from the second look on.
        multiply_adds: adds the multiply-adds left in each layer.
        title: headline.

    Returns:
        A figure that no window system and no global state knows of; ``figure.savefig("report.png")`` writes it.

    Raises:
        TypeError: an argument is of another class.
        ImportError: matplotlib is not installed: ``pip install feather_param[plot]``.

    Example:
        >>> controller = feather_param.sparsify(nn.Linear(4, 4), final_rate=0.75, total_steps=1, end_step=0)
        >>> figure = draw(controller.report(), title="a small layer")
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['weights that survive, of each layer (dashed: all layers, 25.0%)']
    """
    check_arguments(report, history, multiply_adds)
    history = history if history and len(history.looks) > 1 else None
    layers = max(_FEWEST_ROWS, len(report.rows), len(multiply_adds.rows) if multiply_adds else 0)
    widths = [_HISTORY_WIDTH] * bool(history) + [7.0] + [6.0] * (multiply_adds is not None)
    figure = _figure(sum(widths), max(_HISTORY_HEIGHT if history else 0.0, 1.4 + 0.2 * layers))
    if title:
        figure.suptitle(title, fontsize=13, fontweight="bold")
    grid = figure.add_gridspec(1, len(widths), width_ratios=widths)
    parts = [figure.add_subfigure(grid[column]) for column in range(len(widths))]
    if history is not None:
        _draw_history(parts.pop(0), history)
    draw_survivors(parts.pop(0).subplots(), report)
    if multiply_adds is not None:
        same = [row.name for row in report.rows] == [row.name for row in multiply_adds.rows]
        _draw_multiply_adds(parts.pop(0).subplots(), multiply_adds, named=not same)
    return figure


def check_arguments(report: Any, history: Any, multiply_adds: Any) -> None:
    """Raise a TypeError for what is no report, history or count; the latter two may be None."""
    instance(report, Report, "controller.report()")
    if history is not None:
        instance(history, History, "History(controller)")
    if multiply_adds is not None:
        instance(multiply_adds, MultiplyAdds, "multiply_adds(model, input)")


def history_svg(history: History) -> str:
    """Return rate, threshold and churn over the steps as an SVG element for a page; it refers to nothing outside.

    Raises:
        ImportError: matplotlib is not installed: ``pip install feather_param[plot]``.
    """
    figure = _figure(_HISTORY_WIDTH, _HISTORY_HEIGHT)
    _draw_history(figure, history)
    file = io.StringIO()
    with extra("matplotlib.style").context({"svg.fonttype": "none", "svg.hashsalt": "feather_param"}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return file.getvalue()[file.getvalue().index("<svg") :]


def draw_survivors(axes: Axes, report: Report) -> None:
    """Draw the fraction of each layer that survives, and write how many weights that are; dead layers in orange."""
    instance(report, Report, "controller.report()")
    kept = [row.survivors / max(1, row.total) for row in report.rows]
    overall = report.survivors / max(1, report.total)
    longest = max(kept, default=0.0) or 1.0
    axes.barh(range(len(kept)), kept, color=_BLUE, height=0.72)
    labels = [
        f"{percent(part)}  ({row.survivors:,} of {row.total:,})" for part, row in zip(kept, report.rows, strict=True)
    ]
    _name_rows(axes, [row.name for row in report.rows])
    for i, (part, label) in enumerate(zip(kept, labels, strict=True)):
        color = _INK if part else _ORANGE
        axes.text(max(part, overall) + 0.01 * longest, i, label, va="center", fontsize=7, color=color)
    axes.set_xlim(0, 1.45 * longest)  # room for the labels
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= 1])
    axes.xaxis.set_major_formatter(extra("matplotlib.ticker").PercentFormatter(1.0, decimals=None))
    axes.axvline(overall, color=_GREY, linewidth=1, linestyle="--")
    axes.set_xlabel(f"weights that survive, of each layer (dashed: all layers, {percent(overall)})")


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches that no window system knows of."""
    figure = extra("matplotlib.figure").Figure(figsize=(width, height), dpi=120, layout="constrained")
    extra("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def _draw_multiply_adds(axes: Axes, counted: MultiplyAdds, named: bool) -> None:
    dense = [row.dense for row in counted.rows]
    left = [row.left for row in counted.rows]
    longest = max(dense, default=0) or 1
    axes.barh(range(len(dense)), dense, color=_PALE, height=0.72)
    axes.barh(range(len(left)), left, color=_BLUE, height=0.72)
    _name_rows(axes, [row.name if named else "" for row in counted.rows])
    for i, row in enumerate(counted.rows):
        label = f"{percent(row.left / max(1, row.dense))}  ({short(row.left)} of {short(row.dense)})"
        axes.text(row.dense + 0.01 * longest, i, label, va="center", fontsize=7, color=_INK)
    axes.set_xlim(0, 1.4 * longest)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= longest])
    axes.xaxis.set_major_formatter(extra("matplotlib.ticker").EngFormatter(sep=""))
    whole = f"{percent(counted.left / max(1, counted.dense))} of {short(counted.dense)}"
    axes.set_xlabel(f"multiply-adds of each layer, dark: without the zeros (all layers: {whole})")


def _name_rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [name.removesuffix(".weight") for name in names], fontsize=8)
    axes.set_ylim(max(_FEWEST_ROWS, len(names)) - 0.4, -0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_history(part: Figure | SubFigure, history: History) -> None:
    ticker = extra("matplotlib.ticker")
    top, middle, bottom = part.subplots(3, 1, sharex=True)
    part.align_ylabels()
    looks = history.looks
    steps = [look.step for look in looks]
    style: dict[str, Any] = {"marker": "o" if len(steps) <= 30 else None, "markersize": 3}
    top.plot(steps, [look.rate for look in looks], color=_ORANGE, **style)
    top.set_ylabel("rate (zeros)")
    top.set_ylim(0, 1)
    top.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    middle.plot(steps, [look.threshold for look in looks], color=_GREY, **style)
    middle.set_ylabel("threshold")
    for name, color in (("left", _GREY), ("entered", _BLUE)):  # since the look before
        churn = [getattr(look, name) / max(1, look.survivors) for look in looks[1:]]
        bottom.plot(steps[1:], churn, color=color, label=name, **style)
    bottom.set_ylabel("churn (of survivors)")
    bottom.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=None))
    bottom.legend(frameon=False)
    bottom.set_xlabel("optimizer step")
    bottom.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    bottom.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    for axes in (top, middle, bottom):
        axes.set_ylim(bottom=0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(axis="y", color=_PALE, linewidth=0.8)
        axes.set_axisbelow(True)

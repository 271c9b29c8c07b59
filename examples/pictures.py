"""The pictures of a run and of the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import EngFormatter, PercentFormatter

from feather_param.reports.figures import draw_survivors
from feather_param.reports.report import Report

__all__ = ["draw_comparison", "draw_summary"]

Rows = Sequence[Mapping[str, float]]

_BLUE, _ORANGE, _GREY = "#2b6cb0", "#c05621", "#718096"
_SPINES = ("top", "right")


def draw_summary(path: Path, title: str, epochs: Rows, trace: Rows, report: Report | None) -> None:
    """Draw how a run went: accuracy, rate and threshold over the steps, and the survivors of each layer.

    A dense run shows its losses instead of the sparsity.

    Args:
        path: the file to write; its suffix chooses the format.
        title: headline.
        epochs: rows with step, accuracy, train_loss and test_loss.
        trace: rows with step, rate and threshold.
        report: the final state of each layer; None for a dense run.
    """
    layers = 0 if report is None else len(report.rows)
    figure = _figure(13 if report else 8, max(7.0, 1.6 + 0.2 * layers))
    figure.suptitle(title, fontsize=13, fontweight="bold")
    if report is None:
        top, bottom = figure.subplots(2, 1, sharex=True)
        _losses(bottom, epochs)
    else:
        left, right = _halves(figure)
        top, middle, bottom = left.subplots(3, 1, sharex=True)
        left.align_ylabels()
        draw_survivors(right.subplots(), report)
        steps = [row["step"] for row in trace]
        middle.plot(steps, [row["rate"] for row in trace], color=_ORANGE)
        middle.set_ylabel("rate\n(zeros among weights)")
        middle.set_ylim(0, 1)
        middle.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        bottom.plot(steps, [row["threshold"] for row in trace], color=_GREY)
        bottom.set_ylabel("threshold\n(magnitude of a weight)")
        bottom.set_ylim(bottom=0)
        _plain(middle)
    _accuracy(top, {"": epochs})
    bottom.set_xlabel("optimizer step")
    bottom.xaxis.set_major_formatter(EngFormatter(sep=""))
    _plain(bottom)
    _write(figure, path)


def draw_comparison(path: Path, title: str, dense: Rows, sparse: Rows, trace: Rows, report: Report) -> None:
    """Draw a dense and a sparse run of the same recipe beside each other.

    Args:
        path: the file to write.
        title: headline.
        dense: the dense run's rows with step and accuracy.
        sparse: the sparse run's.
        trace: the sparse run's rows with step and rate.
        report: the sparse run's final state of each layer.
    """
    figure = _figure(13, 7)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    left, right = _halves(figure)
    top, bottom = left.subplots(2, 1, sharex=True)
    _accuracy(top, {"dense": dense, "sparse": sparse})
    bottom.plot([row["step"] for row in trace], [row["rate"] for row in trace], color=_ORANGE)
    bottom.set_ylabel("rate of the sparse run\n(zeros among weights)")
    bottom.set_ylim(0, 1)
    bottom.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    bottom.set_xlabel("optimizer step")
    _plain(bottom)
    draw_survivors(right.subplots(), report)
    _write(figure, path)


def _figure(width: float, height: float) -> Figure:
    # Without pyplot: no global state, and no window system asked for.
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _halves(figure: Figure) -> tuple[SubFigure, SubFigure]:
    grid = figure.add_gridspec(1, 2, width_ratios=[1, 1.1])
    return figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _plain(axes: Axes) -> None:
    for side in _SPINES:
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)


def _accuracy(axes: Axes, runs: Mapping[str, Rows]) -> None:
    for (name, rows), color in zip(runs.items(), (_BLUE, _ORANGE), strict=False):
        last = rows[-1]["accuracy"]
        axes.plot(
            [row["step"] for row in rows],
            [row["accuracy"] for row in rows],
            color=color if name else _BLUE,
            marker="o" if len(rows) <= 20 else None,
            markersize=4,
            label=f"{name or 'last epoch'}: {last:.2%}",
        )
    axes.set_ylabel("test accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.legend(frameon=False)
    _plain(axes)


def _losses(axes: Axes, epochs: Rows) -> None:
    steps = [row["step"] for row in epochs]
    for key, label, color in (("train_loss", "training", _GREY), ("test_loss", "test", _BLUE)):
        axes.plot(steps, [row[key] for row in epochs], color=color, label=label)
    axes.set_ylabel("cross-entropy")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", frameon=False)

"""The pictures of the CIFAR-100 runs: accuracy against rate, and the survivors of each layer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.cifar100_results import Cells, Result, cells, full_title, mine, networks, spread
from benchmarks.methods import DENSE
from examples.resumable import save_picture

__all__ = ["write"]

_POWERS = {
    "feather": "p = 3 (feather)",
    "soft": "p = 1 (soft)",
    "p_0.5": "p = 1/2",
}  # labels; the others keep their names
_LAYER_RATES = (0.98, 0.995)
_NONE = 0.001  # where a layer without survivors is drawn on a logarithmic axis


def write(results: Sequence[Result], methods: Sequence[str], folder: Path, title: str) -> dict[str, str]:
    """Write the pictures beside the folder of the runs, and return the names of their files with descriptions.

    ``<folder>.png`` shows the accuracy against the rate. ``<folder>_layers.png`` shows the survivors of each layer at
    98 % and 99.5 % for p = 3, 1 and 1/2. It is written only if there are such runs.

    Args:
        results: the contents of the JSON files of the runs.
        methods: the methods to draw, in the order of the legend.
        folder: the folder of the runs.
        title: the name of the data set.
    """
    title = full_title(results, title)
    path = folder.with_suffix(".png")
    save_picture(_accuracies(results, methods, title), path)
    written = {path.name: "accuracy against rate"}
    shown = [result for result in results if _has_survivors(result)]
    if shown:
        path = folder.with_name(f"{folder.name}_layers.png")
        save_picture(_layers(shown, title), path)
        written[path.name] = "survivors per output of each layer"
    return written


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharey="row", squeeze=False)
    for place in axes.flat:
        place.grid(axis="y", color="#e2e8f0")
        place.spines[["top", "right"]].set_visible(False)
    return figure, axes.tolist()


def _with_legend(figure: Figure) -> Figure:
    """Add one legend for all axes of a figure."""
    labels = {}
    for place in figure.axes:
        for handle, label in zip(*place.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    figure.legend(labels.values(), labels.keys(), loc="outside right center", frameon=False)
    return figure


def _accuracies(results: Sequence[Result], methods: Sequence[str], title: str) -> Figure:
    names = networks(results)
    found = {result["run"]["method"] for result in results} - {DENSE}
    drawn = [method for method in methods if method in found]
    figure, axes = _figure(1, len(names), 2.2 + 5 * len(names), 5.2)
    for network, place in zip(names, axes[0], strict=True):
        _accuracy(place, cells(mine(results, network)), drawn)
        place.set_title(network)
    axes[0][0].set_ylabel("test accuracy, %")
    figure.suptitle(title)
    return _with_legend(figure)


def _position(rate: float) -> float:
    """Return the position of a rate on the axis: its logit, which spreads the rates near 1."""
    return math.log(rate / (1.0 - rate))


def _accuracy(axes: Axes, found: Cells, methods: Sequence[str]) -> None:
    """Draw the accuracy against the rate. An error bar is one standard deviation each way."""
    rates = sorted({rate for _, rate in found if rate})
    if dense := found.get((DENSE, 0.0)):
        mean, deviation = statistics.fmean(dense), spread(dense)
        axes.axhline(mean, color="#718096", linestyle="--", label=DENSE)
        axes.axhspan(mean - deviation, mean + deviation, color="#718096", alpha=0.15, linewidth=0)
    # The colour and the place of a method are the same for all networks, also if some have no results of it.
    for i, method in enumerate(methods):
        there = [rate for rate in rates if (method, rate) in found]
        if not there:
            continue
        axes.errorbar(
            [_position(rate) + 0.02 * (i - len(methods) / 2) for rate in there],
            [statistics.fmean(found[method, rate]) for rate in there],
            yerr=[spread(found[method, rate]) for rate in there],
            label=_POWERS.get(method, method),
            color=f"C{i % 10}",
            linestyle="-" if i < 10 else "--",
            marker="o",
            markersize=5,
            linewidth=2.4 if method == "feather" else 1.2,
            capsize=3,
        )
    axes.set_xticks([_position(rate) for rate in rates], [f"{rate:.1%}" for rate in rates])
    if rates:
        axes.set_xlim(_position(rates[0]) - 0.5, _position(rates[-1]) + 0.5)
    axes.set_xlabel("rate (zeros among prunable weights)")


def _has_survivors(result: Result) -> bool:
    run = result["run"]
    return "layers" in result and run["method"] in _POWERS and run["rate"] in _LAYER_RATES


def _layers(results: Sequence[Result], title: str) -> Figure:
    names = networks(results)
    figure, axes = _figure(len(names), len(_LAYER_RATES), 14, 1 + 4.5 * len(names))
    for network, row in zip(names, axes, strict=True):
        for rate, place in zip(_LAYER_RATES, row, strict=True):
            at_rate = [result for result in mine(results, network) if result["run"]["rate"] == rate]
            _survivors(place, at_rate)
            place.set_title(f"{network}, {rate:.1%} zeros")
        row[0].set_ylabel("survivors per output")
    figure.suptitle(
        f"{title}: mean over the seeds; below 1 (dashed), some outputs have no weights; cross: no survivors"
    )
    return _with_legend(figure)


def _survivors(axes: Axes, results: Sequence[Result]) -> None:
    """Draw the survivors of each layer per output, as the mean over the seeds, with one line for each p."""
    for i, (method, label) in enumerate(_POWERS.items()):
        seeds = [result["layers"] for result in results if result["run"]["method"] == method]
        if not seeds:
            continue
        means = [
            statistics.fmean(layer["survivors"] / layer["outputs"] for layer in layers)
            for layers in zip(*seeds, strict=True)
        ]
        axes.plot(range(len(means)), [value or math.nan for value in means], f"C{i}o-", markersize=4, label=label)
        dead = [at for at, value in enumerate(means) if not value]
        axes.plot(dead, [_NONE] * len(dead), f"C{i}x", markersize=8)
        names = [layer["name"].removesuffix(".weight") for layer in seeds[0]]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yscale("log")
    axes.axhline(1.0, color="#718096", linestyle="--")

"""The results of the CIFAR-100 runs: a table of mean ± standard deviation over the seeds, and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import cifar100_run, timing
from benchmarks.methods import DENSE

__all__ = ["read", "write"]

Result = dict[str, Any]


def read(folder: Path) -> list[Result]:
    """Return the contents of the JSON files of a folder. A missing folder has none.

    Raises:
        ValueError: a file is damaged, or not that of a run.
    """
    return [cifar100_run.read(path) for path in sorted(folder.glob("*.json"))]


def write(results: Sequence[Result], about: Mapping[str, str], folder: Path, title: str = "CIFAR-100") -> str:
    """Write the table and the picture beside the folder of the runs, and return the table in Markdown.

    Args:
        results: the contents of the JSON files of the runs.
        about: the methods in the order of the table, with a short description of each.
        folder: the folder of the runs. The files ``<folder>.md`` and ``<folder>.png`` are written.
        title: the name of the data set.
    """
    run = results[0]["run"]
    images = "all" if run["train_size"] is None else f"{run['train_size']:,}"
    title = f"{title}, {run['epochs']} epochs, {images} training images"
    text = _page(results, about, folder.with_suffix(".png").name, title)
    timing.write_whole(folder.with_suffix(".md"), text)
    _draw(results, list(about), folder.with_suffix(".png"), title)
    return text


def _page(results: Sequence[Result], about: Mapping[str, str], picture: str, title: str) -> str:
    run = results[0]["run"]
    lines = [
        f"# {title}",
        "",
        "Test accuracy in %, mean ± standard deviation over the seeds (with their number n where there are fewer than "
        "elsewhere), and the difference to the dense network. Written by `benchmarks/cifar100_table.py`.",
        "",
    ]
    for network in dict.fromkeys(result["run"]["network"] for result in results):
        mine = [result for result in results if result["run"]["network"] == network]
        width = f", widths {run['width']}, {2 * run['width']}, {4 * run['width']}" if run["width"] else ""
        lines += [f"## {network}{width}", "", _table(mine, about), ""]
    exact = all(result["zeros"] == result["promised"] for result in results if result["run"]["rate"])
    dead = sorted({name for result in results for name in result["dead"]})
    machines = {(r["machine"]["gpu"] or r["machine"]["cpu"], r["machine"]["torch"]) for r in results}
    commits = sorted({result["machine"]["commit"] for result in results})
    lines += [
        f"The number of zeros is {'exactly' if exact else 'NOT'} the promised one in each of the {len(results)} runs; "
        + (f"layers without survivors in some run: {', '.join(dead)}." if dead else "no layer died in any."),
        "",
        f"Measured on {'; '.join(f'{name} with torch {version}' for name, version in sorted(machines))}, "
        f"{statistics.median(result['seconds'] for result in results):,.0f} s a run (median), at "
        f"{', '.join(commits)}.",
        "",
        "| method | description |",
        "| --- | --- |",
        *(f"| {name} | {what} |" for name, what in about.items() if any(r["run"]["method"] == name for r in results)),
        "",
        f"![accuracy against rate]({picture})",
        "",
    ]
    return "\n".join(lines)


def _table(results: Sequence[Result], about: Mapping[str, str]) -> str:
    cells = _cells(results)
    rates = sorted({rate for _, rate in cells if rate})
    most = max((len(values) for values in cells.values()), default=0)
    dense = cells.get((DENSE, 0.0), [])
    rows = [["dense", _cell(dense, [], most), *[""] * (len(rates) - 1)]] if dense else []
    for method in about:
        if method != DENSE and any((method, rate) in cells for rate in rates):
            rows.append([method, *(_cell(cells.get((method, rate), []), dense, most) for rate in rates)])
    return timing.show(["method", *(f"{rate:.1%} zeros" for rate in rates)], rows)


def _cells(results: Sequence[Result]) -> dict[tuple[str, float], list[float]]:
    """Return the accuracies of the seeds in percent, by method and rate."""
    cells: dict[tuple[str, float], list[float]] = {}
    for result in results:
        cells.setdefault((result["run"]["method"], result["run"]["rate"]), []).append(100 * result["accuracy"])
    return cells


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _cell(values: Sequence[float], dense: Sequence[float], most: int) -> str:
    if not values:
        return "not run"
    mean = statistics.fmean(values)
    text = f"{mean:.2f}" + (f" ± {_spread(values):.2f}" if len(values) > 1 else "")
    text += f" (n = {len(values)})" if len(values) != most else ""
    return text + (f" [{mean - statistics.fmean(dense):+.2f}]" if dense else "")


def _draw(results: Sequence[Result], methods: Sequence[str], path: Path, title: str) -> None:
    networks = list(dict.fromkeys(result["run"]["network"] for result in results))
    figure = Figure(figsize=(2 + 5 * len(networks), 5.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(networks), squeeze=False)[0]
    for network, place in zip(networks, axes, strict=True):
        mine = [result for result in results if result["run"]["network"] == network]
        _accuracy(place, _cells(mine), methods)
        place.set_title(network)
    axes[0].set_ylabel("test accuracy, %")
    figure.suptitle(title)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(path)


def _accuracy(axes: Axes, cells: Mapping[tuple[str, float], Sequence[float]], methods: Sequence[str]) -> None:
    """Draw the accuracy against the rate. Rates are evenly spaced. An error bar is one standard deviation each."""
    rates = sorted({rate for _, rate in cells if rate})
    if dense := cells.get((DENSE, 0.0)):
        mean, spread = statistics.fmean(dense), _spread(dense)
        axes.axhline(mean, color="#718096", linestyle="--", label=DENSE)
        axes.axhspan(mean - spread, mean + spread, color="#718096", alpha=0.15, linewidth=0)
    drawn = [method for method in methods if any((method, rate) in cells for rate in rates)]
    for i, method in enumerate(drawn):
        there = [(at, cells[method, rate]) for at, rate in enumerate(rates) if (method, rate) in cells]
        axes.errorbar(
            [at + 0.05 * (i - len(drawn) / 2) for at, _ in there],
            [statistics.fmean(values) for _, values in there],
            yerr=[_spread(values) for _, values in there],
            label=method,
            color=f"C{i}",
            marker="o",
            markersize=5,
            linewidth=2.4 if method == "feather" else 1.2,
            capsize=3,
        )
    axes.set_xticks(range(len(rates)), [f"{rate:.1%}" for rate in rates])
    axes.set_xlim(-0.5, max(1, len(rates)) - 0.5)  # a single rate is in the middle
    axes.set_xlabel("rate (zeros among prunable weights)")
    axes.grid(axis="y", color="#e2e8f0")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)

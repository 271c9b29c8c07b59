"""The results of the CIFAR-100 runs: a page with tables of mean ± standard deviation over the seeds."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cifar100_run, timing
from benchmarks.methods import DENSE

__all__ = ["Cells", "Result", "cells", "full_title", "mine", "networks", "read", "sections", "spread", "write"]

Result = dict[str, Any]
"""The content of the JSON file of a run."""

CAPTION = (
    "Test accuracy in %, mean ± standard deviation over the seeds (with their number n where there are fewer than "
    "elsewhere), and the difference to the dense network."
)

Cells = dict[tuple[str, float], list[float]]
"""The accuracies of the seeds in percent, by method and rate."""


def read(folder: Path) -> list[Result]:
    """Return the contents of the JSON files of a folder. A missing folder has none.

    Raises:
        ValueError: a file is damaged, or not that of a run.
    """
    return [cifar100_run.read(path) for path in sorted(folder.glob("*.json"))]


def networks(results: Sequence[Result]) -> list[str]:
    """Return the networks of the results, in their order."""
    return list(dict.fromkeys(result["run"]["network"] for result in results))


def mine(results: Sequence[Result], network: str) -> list[Result]:
    """Return the results of a network."""
    return [result for result in results if result["run"]["network"] == network]


def cells(results: Sequence[Result]) -> Cells:
    """Return the accuracies of the seeds in percent, by method and rate."""
    found: Cells = {}
    for result in results:
        found.setdefault((result["run"]["method"], result["run"]["rate"]), []).append(100 * result["accuracy"])
    return found


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation of a sample, and 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def full_title(results: Sequence[Result], title: str) -> str:
    """Return the title of a page: the data set, the epochs and the number of training images."""
    run = results[0]["run"]
    images = "all" if run["train_size"] is None else f"{run['train_size']:,}"
    return f"{title}, {run['epochs']} epochs, {images} training images"


def write(
    results: Sequence[Result], about: Mapping[str, str], folder: Path, title: str, pictures: Mapping[str, str]
) -> str:
    """Write the page beside the folder of the runs, as ``<folder>.md``, and return it in Markdown.

    Args:
        results: the contents of the JSON files of the runs.
        about: the methods in the order of the table, with a short description of each.
        folder: the folder of the runs.
        title: the name of the data set.
        pictures: the names of picture files, each with a description.
    """
    text = _page(results, about, title, pictures)
    timing.write_whole(folder.with_suffix(".md"), text)
    return text


def _page(results: Sequence[Result], about: Mapping[str, str], title: str, pictures: Mapping[str, str]) -> str:
    lines = [f"# {full_title(results, title)}", "", f"{CAPTION} Written by `benchmarks/cifar100_table.py`.", ""]
    lines += sections(results, about)
    for picture, description in pictures.items():
        lines += [f"![{description}]({picture})", ""]
    return "\n".join(lines)


def sections(results: Sequence[Result], about: Mapping[str, str], heading: str = "##") -> list[str]:
    """Return the lines of a section with a table for each network, of the facts below them, and of the methods.

    Args:
        results: the contents of the JSON files of the runs.
        about: the methods in the order of the table, with a short description of each.
        heading: what the heading of a section begins with.
    """
    lines = []
    for network in networks(results):
        own = mine(results, network)
        lines += [f"{heading} {network}{_width(own[0])}", "", _table(own, about), ""]
    exact = all(result["zeros"] == result["promised"] for result in results if result["run"]["rate"])
    lines += [
        f"The number of zeros is {'exactly' if exact else 'NOT'} the promised one in each of the {len(results)} runs; "
        f"{_deaths(results)}.",
        "",
        _measured(results),
        "",
        "| method | description |",
        "| --- | --- |",
        *(f"| {name} | {what} |" for name, what in about.items() if any(r["run"]["method"] == name for r in results)),
        "",
    ]
    return lines


def _width(result: Result) -> str:
    """Return the width of a network as text: a multiplier, or the numbers of channels of the stages of ResNet-20."""
    width = result["run"]["width"]
    if not width:
        return ""
    return (
        f", widths {width}, {2 * width}, {4 * width}" if result["run"]["network"] == "resnet20" else f", width {width}"
    )


def _deaths(results: Sequence[Result]) -> str:
    """Return how many runs of each method end with a layer without survivors."""
    counts = Counter(result["run"]["method"] for result in results if result["dead"])
    if not counts:
        return "no layer died in any"
    runs = Counter(result["run"]["method"] for result in results)
    return "runs with layers without survivors: " + ", ".join(
        f"{count} of {runs[method]} of {method}" for method, count in sorted(counts.items())
    )


def _measured(results: Sequence[Result]) -> str:
    machines = {(r["machine"]["gpu"] or r["machine"]["cpu"], r["machine"]["torch"]) for r in results}
    commits = sorted({result["machine"]["commit"] for result in results})
    return (
        f"Measured on {'; '.join(f'{name} with torch {version}' for name, version in sorted(machines))}, "
        f"{statistics.median(result['seconds'] for result in results):,.0f} s a run (median), at {', '.join(commits)}."
    )


def _table(results: Sequence[Result], about: Mapping[str, str]) -> str:
    found = cells(results)
    rates = sorted({rate for _, rate in found if rate})
    most = max((len(values) for values in found.values()), default=0)
    dense = found.get((DENSE, 0.0), [])
    rows = [["dense", _cell(dense, [], most), *[""] * (len(rates) - 1)]] if dense else []
    for method in about:
        if method != DENSE and any((method, rate) in found for rate in rates):
            rows.append([method, *(_cell(found.get((method, rate), []), dense, most) for rate in rates)])
    return timing.show(["method", *(f"{rate:.1%} zeros" for rate in rates)], rows)


def _cell(values: Sequence[float], dense: Sequence[float], most: int) -> str:
    if not values:
        return "not run"
    mean = statistics.fmean(values)
    text = f"{mean:.2f}" + (f" ± {spread(values):.2f}" if len(values) > 1 else "")
    text += f" (n = {len(values)})" if len(values) != most else ""
    return text + (f" [{mean - statistics.fmean(dense):+.2f}]" if dense else "")

"""The page of all parts, from their JSON files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cifar100_results, timing
from benchmarks.gpu.budget import finished, read
from benchmarks.gpu.tables import contents
from benchmarks.methods import DENSE, METHODS

__all__ = ["FILES", "write"]

FILES = {"a": "a_checks.json", "b": "b_kernels.json", "c": "c_epochs.json", "d": "d_runs.json", "e": "e_table.json"}

Records = Mapping[str, Mapping[str, Any]]
_SHOWN = 5  # pieces that were not started
_MACHINE = ("gpu", "driver", "cuda", "torch", "triton", "torchvision", "python", "cpu", "cores", "commit", "date")


def write(folder: Path) -> str:
    """Write ``page.md`` to the folder of the JSON files, and return it in Markdown.

    Raises:
        ValueError: a file is damaged, or not that of a part.
    """
    parts = {letter: read(folder / file) for letter, file in FILES.items() if (folder / file).is_file()}
    text = "\n".join(_page(parts)) + "\n"
    timing.write_whole(folder / "page.md", text)
    return text


def _page(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    everything = [record for part in parts.values() for record in part["pieces"].values()]
    machines = _machines(everything)
    lines = [
        "# Measurements of one GPU",
        "",
        "Written by `python -m benchmarks.gpu` from the JSON files beside it.",
        "",
    ]
    if any(part["rehearsed"] for part in parts.values()):
        lines += ["**This is a rehearsal: the sizes are tiny and the numbers mean nothing.**", ""]
    lines += ["## Machines", ""]
    rows = [[str(i), *(str(machine.get(key)) for key in _MACHINE)] for i, machine in enumerate(machines, 1)]
    lines += [timing.show(["number", *_MACHINE], rows), ""]
    if len(machines) > 1:
        lines += ["The results come from several machines or commits. Compare numbers of one machine only.", ""]
    for letter, part in parts.items():
        records: Records = part["pieces"]
        lines += [f"## {letter}. {part['title']}", "", *_BODIES[letter](records, _Numbers(machines))]
        lines += _faults(part)
    runs = {str(result["run"]): result for letter in ("d", "e") if letter in parts for result in _runs(parts[letter])}
    return lines + _accuracies([*runs.values()])


def _machines(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for record in records:
        if machine := record.get("machine"):
            found.setdefault(str({**machine, "date": None}), machine)
    return [*found.values()]


class _Numbers:
    """The number of the machine of a record."""

    def __init__(self, machines: Sequence[Mapping[str, Any]]) -> None:
        self._machines = [{**machine, "date": None} for machine in machines]

    def __call__(self, record: Mapping[str, Any]) -> str:
        return str(1 + self._machines.index({**record["machine"], "date": None}))


def _measured(records: Records) -> dict[str, Mapping[str, Any]]:
    return {name: record for name, record in records.items() if "figures" in record}


def _checks(records: Records, number: _Numbers) -> list[str]:
    rows, failures = [], []
    for name, record in _measured(records).items():
        figures = record["figures"]
        counts = [str(figures[key]) for key in ("passed", "failed", "skipped")]
        rows.append([name, *counts, f"{record['seconds']:.0f}", number(record)])
        for failed in figures["failures"]:
            failures += [f"`{failed['test']}` failed:", "", *_code(failed["message"])]
    return [timing.show(["tests", "passed", "failed", "skipped", "seconds", "machine"], rows), "", *failures]


def _kernels(records: Records, number: _Numbers) -> list[str]:
    measured = _measured(records)
    rows = [
        [name, f"{1e3 * row['seconds']:.3f}", f"{row['over reading once']:.2f}", number(record)]
        for record in measured.values()
        for name, row in record["figures"].get("rows", {}).items()
    ]
    steps, waits = [], []
    for name, record in measured.items():
        for how, times in record["figures"].get("times", {}).items():
            numbers = [
                f"{1e3 * times['dense']:.2f}",
                f"{1e3 * times['sparse']:.2f}",
                f"{times['sparse over dense']:.3f}",
            ]
            steps.append([f"{name.partition(',')[0]}, {how}", *numbers, number(record)])
        if "synchronisations" in record["figures"]:
            figures = record["figures"]
            counts = [_count(figures["synchronisations"][kind]) for kind in ("dense", "sparse")]
            waits.append([name.partition(",")[0] + ", " + next(iter(figures["times"])), str(figures["steps"]), *counts])
    lines = [timing.show(["what", "ms", "over reading once", "machine"], rows), ""]
    lines += [timing.show(["whole step", "dense ms", "sparse ms", "sparse over dense", "machine"], steps), ""]
    return [*lines, timing.show(["synchronisations of the host", "steps", "dense", "sparse"], waits), ""]


def _count(count: int | None) -> str:
    return "not counted" if count is None else str(count)


def _epochs(records: Records, number: _Numbers) -> list[str]:
    rows = []
    for name, record in _measured(records).items():
        figures = record["figures"]
        dense, sparse = figures["dense"], figures["sparse"]
        steps = [f"{1e3 * kind['step']:.2f}" for kind in (dense, sparse)]
        epochs = [f"{kind['epoch']:.2f}" for kind in (dense, sparse)]
        ratio, whole = f"{figures['sparse over dense']:.3f}", f"{160 * sparse['epoch'] / 60:.1f}"
        rows.append([name, *steps, *epochs, ratio, whole, number(record)])
    header = ["of one network", "dense ms a step", "sparse ms a step", "dense s an epoch", "sparse s an epoch"]
    header += ["sparse over dense", "160 epochs, sparse, minutes", "machine"]
    return [timing.show(header, rows), ""]


def _groups(records: Records, number: _Numbers) -> list[str]:
    rows = []
    for name, record in _measured(records).items():
        outcome = record.get("unfinished", f"{len(record['figures']['runs'])} finished")
        rows.append([name, outcome, f"{record['seconds']:.0f}", number(record)])
    return [timing.show(["networks that trained at once", "runs", "seconds", "machine"], rows), ""]


_BODIES: dict[str, Callable[[Records, _Numbers], list[str]]] = {
    "a": _checks,
    "b": _kernels,
    "c": _epochs,
    "d": _groups,
    "e": _groups,
}


def _faults(part: Mapping[str, Any]) -> list[str]:
    """Return what raised and what was not started."""
    records: Records = part["pieces"]
    lines = []
    named = [("The part", part.get("error")), *((f"`{name}`", record.get("error")) for name, record in records.items())]
    for name, error in named:
        if error:
            trace = "\n".join(error["traceback"])
            lines += [f"{name} raised {error['type']}:", "", *_code(f"{error['message']}\n\n{trace}")]
    waiting = {name: record for name, record in records.items() if not finished(record) and "left" in record}
    for name, record in [*waiting.items()][:_SHOWN]:
        lines.append(f"* `{name}` was not started: expected {record['expected']:.0f} s, {record['left']:.0f} s left.")
    if len(waiting) > _SHOWN:
        lines.append(f"* {len(waiting) - _SHOWN} others were not started.")
    return [*lines, ""] if lines else []


def _code(text: str) -> list[str]:
    return ["```", *text.splitlines(), "```", ""]


def _runs(part: Mapping[str, Any]) -> list[cifar100_results.Result]:
    return contents(part["pieces"])


def _accuracies(results: Sequence[cifar100_results.Result]) -> list[str]:
    """Return the tables of the accuracies."""
    if not results:
        return []
    about = {DENSE: "the same recipe without zeros", **{name: method.about for name, method in METHODS.items()}}
    publish = "`--publish` copies the runs as single files to `benchmarks/results/cifar100_paper`, where "
    publish += "`python -m benchmarks.cifar100_table --only-table` makes its table of them."
    lines = ["## Accuracies", "", cifar100_results.CAPTION, "", publish, ""]
    return lines + cifar100_results.sections(results, about, "###")

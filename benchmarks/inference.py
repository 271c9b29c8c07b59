"""Measure the inference of pruned networks on a CPU: `python -m benchmarks.inference [--rivals]`.

The methods take turns, each on the given number of threads and in float32:

    dense         the network in torch
    compiled      the network after `torch.compile` (inductor) with constant weights
    ONNX Runtime  the exported network
    OpenVINO      the exported network (`pip install openvino`)
    DeepSparse    the exported network in DeepSparse 1.8, which leaves its zeros out (--deepsparse)
    ours          the network of `feather_param.to_sparse_inference`

Without `--rivals` only dense and ours are measured. A rival that is missing is named with the reason. DeepSparse needs
Python 3.10 or older and an environment of its own: `python3.10 -m venv ENV && ENV/bin/pip install deepsparse==1.8.0`,
then `--deepsparse ENV/bin/python`.

The networks of `inference_networks.py` have random weights. `--checkpoint` measures trained weights of the network
`--arch` instead, for images of side `--size`. A case whose result at this commit is in the results file is not measured
again, unless `--again` is given.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import archs
from benchmarks import timing
from benchmarks.inference_networks import CASES, NETWORKS, pruned, rate_of, trained
from benchmarks.rivals import METHODS, Running, Work, absent, versions

Build = Callable[[], tuple[nn.Module, Tensor]]


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", action="store_true", help="measure the other runtimes too")
    parser.add_argument("--deepsparse", default="", metavar="PYTHON", help="Python of the environment with DeepSparse")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, help="only these networks; default: all")
    parser.add_argument("--rates", type=float, nargs="+", help="only these rates, as 0.95; default: all")
    parser.add_argument("--batch", type=int, nargs="+", help="only these batch sizes; default: all, 1 for checkpoints")
    parser.add_argument("--checkpoint", nargs="+", type=Path, default=[], help="state_dicts, or files of save_sparse")
    parser.add_argument("--arch", choices=archs.__all__, default="resnet20", help="network of the checkpoints")
    parser.add_argument("--size", type=int, nargs="+", default=[32], help="sides of the checkpoints' images")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--suffix", help="the results file is inference_SUFFIX.json; default: rivals with --rivals")
    parser.add_argument("--again", action="store_true", help="measure cases again that the results file has")
    arguments = parser.parse_args(words)
    if arguments.rounds < 2:
        parser.error(f"expected at least 2 rounds, got {arguments.rounds}")
    if not selected(arguments):
        parser.error(
            "expected a case of these networks, rates and batch sizes, got none of " + "; ".join(map(str, CASES))
        )
    return arguments


def selected(arguments: argparse.Namespace) -> dict[str, Build]:
    """Return the names of the cases that the options ask for, and what makes each."""
    cases: dict[str, Build] = {}
    for path, size, batch in itertools.product(arguments.checkpoint, arguments.size, arguments.batch or [1]):
        name = f"{arguments.arch} of {path.name}, {size} px, batch {batch}"
        cases[name] = lambda path=path, size=size, batch=batch: trained(path, arguments.arch, size, batch)
    for case in [] if arguments.checkpoint else CASES:
        wanted = zip(case, (arguments.networks, arguments.rates, arguments.batch), strict=True)
        if all(options is None or value in options for value, options in wanted):
            cases[str(case)] = lambda case=case: pruned(case)
    return cases


def measure(work: Work, methods: Collection[str], n: int, say: Callable[[str], object]) -> dict[str, Any]:
    """Return the figures of one network. Methods that fail are named with their error."""
    torch.set_num_threads(work.threads)
    running: dict[str, Running] = {}
    failed = {}
    try:
        with torch.inference_mode():
            for method in methods:
                say(f"starting {method}")
                try:
                    running[method] = METHODS[method](work)
                except Exception as error:
                    failed[method] = f"{type(error).__name__}: {error}".partition("\n")[0]
            say(f"measuring {len(running)} methods")
            seconds = timing.rounds({name: each.call for name, each in running.items()}, n, warmup=2, untimed=1)
    finally:
        for each in running.values():
            each.close()
    expected = running["dense"].output
    return {
        "zeros": rate_of(work.model),
        "threads": work.threads,
        "rounds": n,
        "seconds": timing.medians(seconds),
        "shortest seconds": timing.minima(seconds),
        "quartiles' distance over median": timing.spreads(seconds),
        "times of ours": {name: timing.ratio(seconds, name, "ours") for name in running} if "ours" in running else {},
        "largest difference over largest output": {
            name: float((each.output - expected).abs().max() / expected.abs().max()) for name, each in running.items()
        },
        "failed": failed,
        "details": {name: each.details for name, each in running.items() if each.details},
    }


def is_measured(row: Mapping[str, Any] | None, methods: Collection[str]) -> bool:
    """Tell whether a result of an earlier run has all methods."""
    return row is not None and all(method in row["seconds"] or method in row["failed"] for method in methods)


def table(figures: Mapping[str, Mapping[str, Any]], methods: Collection[str], missing: Mapping[str, str]) -> str:
    """Return the table of the results, with a line for each method that is missing or failed."""
    rows = []
    notes = [f"{method} is missing: {reason}" for method, reason in missing.items() if method in methods]
    for name, row in figures.items():
        cells = [
            f"{1e3 * row['seconds'][method]:.2f} / {1e3 * row['shortest seconds'][method]:.2f}"
            if method in row["seconds"]
            else "-"
            for method in methods
        ]
        factors = {method: factor for method, factor in row["times of ours"].items() if method != "ours"}
        best = min(factors, key=lambda method: row["seconds"][method], default="")
        of_onnx_runtime = factors.get("ONNX Runtime")
        rows.append(
            [
                name,
                *cells,
                f"{factors[best]:.2f} ({best})" if best else "-",
                f"{of_onnx_runtime:.2f}" if of_onnx_runtime else "-",
            ]
        )
        notes += [f"{method} failed on {name}: {reason}" for method, reason in row["failed"].items()]
    header = ["ms: median / shortest", *methods, "ours is faster than the best other by", "than ONNX Runtime by"]
    return "\n".join([timing.show(header, rows), *(f"\n{note}" for note in notes)])


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(words)
    methods = list(METHODS) if arguments.rivals else ["dense", "ours"]
    missing = {name: reason for name, reason in absent(arguments.deepsparse).items() if name in methods}
    available = [method for method in methods if method not in missing]
    suffix = arguments.suffix if arguments.suffix is not None else "rivals" if arguments.rivals else ""
    file = f"inference_{suffix}" if suffix else "inference"
    figures = timing.read(file)
    cases = {
        f"{name}, {threads} thread{'s'[: threads - 1]}": (build, threads)
        for threads in arguments.threads
        for name, build in selected(arguments).items()
    }
    facts = {"threads": arguments.threads, "versions": versions(arguments.deepsparse if arguments.rivals else "")}
    with tqdm(cases.items(), unit="case") as bar:
        for name, (build, threads) in bar:
            if is_measured(figures.get(name), available) and not arguments.again:
                continue
            bar.set_description(name)
            bar.set_postfix_str("pruning")
            model, x = build()
            with tempfile.TemporaryDirectory() as folder:
                work = Work(model, x, threads, Path(folder), arguments.deepsparse)
                figures[name] = measure(work, available, arguments.rounds, bar.set_postfix_str)
            timing.write(file, figures, **facts)  # keeps the results so far if a later case fails
    print(table({name: figures[name] for name in cases}, methods, missing))
    print(f"\nThe results are in {timing.RESULTS / file}.json.")


if __name__ == "__main__":
    main()

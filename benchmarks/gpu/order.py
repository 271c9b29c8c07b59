"""The order of the runs of parts d and e, as functions of the results so far."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.cifar100_results import Result
from benchmarks.cifar100_run import Run
from benchmarks.cifar100_table import PROTOCOLS
from benchmarks.methods import DENSE

__all__ = ["papers_runs", "starving", "telling_runs", "winner"]

NETWORKS = ("mobilenet_v1", "resnet20")
METHODS = ("feather", "soft", "p_0.5")  # p = 3, 1 and 1/2
_FIRST = (0.995, 0.98)


def _run(network: str, method: str, rate: float, seed: int = 0) -> Run:
    return Run(network, 0, method, rate, seed, PROTOCOLS["paper"].epochs, None)


def telling_runs(results: Sequence[Result]) -> list[Run]:
    """Return the runs of part d: whether a smaller p is better at high rates after the paper's 160 epochs as well.

    p = 3, 1 and 1/2 at 99.5, 98 and 99 %, then the dense networks, then the winner at 90 and 95 % beside p = 3, then
    two further seeds of all. The allocation `square_root` follows for the networks that p = 3 starves at 98 %.
    """
    runs = [_run(network, method, rate) for network in NETWORKS for rate in _FIRST for method in METHODS]
    runs += [_run(network, method, 0.99) for network in NETWORKS for method in METHODS]
    runs += [_run(network, DENSE, 0.0) for network in NETWORKS]
    beside = dict.fromkeys(("feather", winner(results)))
    runs += [_run(network, method, rate) for network in NETWORKS for rate in (0.9, 0.95) for method in beside if method]
    runs += [replace(run, seed=seed) for seed in (1, 2) for run in runs]
    hungry = [network for network in NETWORKS if starving(results, network)]
    return runs + [
        _run(network, "square_root", rate, seed) for seed in range(3) for network in hungry for rate in _FIRST
    ]


def winner(results: Sequence[Result]) -> str | None:
    """Return the method with the best mean accuracy at 98 and 99.5 %; None as long as there is no result.

    Only the cells of network, rate and seed count that all methods have. If there is none, all cells count.
    """
    found: dict[tuple[str, float, int], dict[str, float]] = {}
    for result in results:
        run = result["run"]
        if run["method"] in METHODS and run["rate"] in _FIRST:
            cell = run["network"], run["rate"], run["seed"]
            found.setdefault(cell, {})[run["method"]] = result["accuracy"]
    cells = [cell for cell in found.values() if len(cell) == len(METHODS)] or list(found.values())
    means = {
        method: statistics.fmean(cell[method] for cell in cells if method in cell)
        for method in METHODS
        if any(method in cell for cell in cells)
    }
    return max(means, key=means.__getitem__) if means else None


def starving(results: Sequence[Result], network: str) -> bool:
    """Return whether a run of p = 3 at 98 % has a layer with fewer survivors than outputs."""
    return any(
        layer["survivors"] < layer["outputs"]
        for result in results
        if (result["run"]["network"], result["run"]["method"], result["run"]["rate"]) == (network, "feather", 0.98)
        for layer in result["layers"]
    )


def papers_runs(results: Sequence[Result]) -> list[Run]:
    """Return the runs of part e, the paper's table: ResNet-20 and p = 3 first, and one seed after the other."""
    protocol = PROTOCOLS["paper"]
    methods = ("feather", DENSE, *(method for method in protocol.methods if method != "feather"))
    turn = {method: i for i, method in enumerate(methods)}
    networks = {network: i for i, network in enumerate(protocol.widths)}  # ResNet-20 is the first
    return sorted(protocol.runs(), key=lambda run: (run.seed, networks[run.network], turn[run.method]))

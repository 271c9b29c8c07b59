"""The paper's CIFAR-100 table, from one command: `python -m benchmarks.cifar100_table --data-dir DATA`.

There is a run for each combination of network, rate, seed and method. Each run has a JSON file in a folder of
``benchmarks/results``, for example ``cifar100_paper``. Only the runs without a file are made. Ctrl-C saves the
unfinished runs, and the next call continues them. The table is written beside the folder at the end, in Markdown and as
a picture. ``--only-table`` writes it at any time.

``--protocol paper`` is that of the paper, with all images and 160 epochs. ``--protocol ten`` does not need a GPU: it
trains small networks on the first ten classes for 20 epochs. ``--protocol digits`` needs no data set either: it trains
on scikit-learn's digits, in 15 minutes on two cores.
All compute in bfloat16 where that is safe (autocast), except MobileNetV1 on a CPU, which is faster in float32.
"""

from __future__ import annotations

from feather_param.utils import signals

if __name__ == "__main__":
    signals.end_at_once()  # on Ctrl-C during the imports, which take seconds

import argparse
import contextlib
import multiprocessing
import os
import queue
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import cifar100_pictures, cifar100_results, timing, together
from benchmarks.cifar100_run import BATCH, Run, execute
from benchmarks.methods import DENSE, METHODS
from benchmarks.network import possible
from examples.data import ImageData, load_data
from examples.resumable import UserError
from examples.script import reason
from examples.stop import StopRequest

__all__ = ["PROTOCOLS", "Protocol", "main"]


@dataclass(frozen=True)
class Protocol:
    """The runs of a table.

    Attributes:
        widths: the networks, each with its width; 0 for its default.
        rates: the final rates.
        methods: the methods, in addition to the dense network.
        seeds: the number of seeds.
        epochs: the number of epochs.
        train_size: the number of training images; None for all.
        dataset: the data set.
        title: its name in the table.
        first: the methods whose runs are made before all others, at the rates `first_rates`.
        first_rates: see `first`.
        drawn: the methods in the picture of the accuracies; all of them if there are none.
    """

    widths: Mapping[str, float]
    rates: tuple[float, ...]
    methods: tuple[str, ...]
    seeds: int
    epochs: int
    train_size: int | None = None
    dataset: str = "cifar100"
    title: str = "CIFAR-100"
    first: tuple[str, ...] = ()
    first_rates: tuple[float, ...] = ()
    drawn: tuple[str, ...] = ()

    def runs(self) -> list[Run]:
        """Return the runs in their order: for each network, the dense runs, then those of each method.

        The runs of `first` are made before the others, one seed after the other.
        """

        def run(network: str, method: str, rate: float, seed: int) -> Run:
            return Run(network, self.widths[network], method, rate, seed, self.epochs, self.train_size)

        runs = []
        for network in self.widths:
            for seed in range(self.seeds):
                runs.append(run(network, DENSE, 0.0, seed))
            for method in self.methods:
                runs += [run(network, method, rate, seed) for seed in range(self.seeds) for rate in self.rates]
        return sorted(runs, key=self._turn)  # stable: the order above is kept within a turn

    def _turn(self, run: Run) -> tuple[bool, int]:
        if not self.first:
            return False, 0
        early = run.method == DENSE or (run.method in self.first and run.rate in self.first_rates)
        return not early, run.seed


PAPERS_RATES = (0.90, 0.95, 0.98, 0.99, 0.995)
CORE = ("feather", "soft", "p_0.5", "gradual", "one_shot")
ALLOCATIONS = ("erk", "lamp", "square_root", "normalised", "uniform", "guard", "p_0.5_square_root")
VARIANTS = ("late_freeze", "late_end", "warm_up", "ema", "ham")

PROTOCOLS = {
    "paper": Protocol(
        widths={"resnet20": 0, "mobilenet_v1": 0, "densenet": 0},
        rates=PAPERS_RATES,
        methods=("feather", "hard", "soft", "theta_1", "theta_0.5", "one_shot", "gradual"),
        seeds=3,
        epochs=160,
    ),
    "ten": Protocol(
        widths={"mobilenet_v1": 0.5, "resnet20": 16},
        rates=PAPERS_RATES[::-1],  # the methods differ most at the largest rates, which are therefore the first
        methods=(*CORE, *ALLOCATIONS, *VARIANTS),
        seeds=3,
        epochs=20,
        dataset="ten",
        title="Ten classes of CIFAR-100",
        first=("feather", "soft", "p_0.5", "gradual"),
        first_rates=(0.995, 0.98, 0.90),
        drawn=CORE,
    ),
    "digits": Protocol(
        widths={"resnet20": 0},
        rates=(*PAPERS_RATES, 0.998),
        methods=("feather", "soft", "p_0.5", "one_shot", "gradual"),
        drawn=CORE,
        seeds=3,
        epochs=24,
        dataset="digits",
        title="scikit-learn's digits",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Make the missing runs, write the table and the picture, and return the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    protocol = PROTOCOLS[arguments.protocol]
    if unknown := set(arguments.networks or ()) - protocol.widths.keys():
        known = ", ".join(protocol.widths)
        parser.error(
            f"argument --networks: expected {known} in protocol {arguments.protocol}, got {', '.join(unknown)}"
        )
    overrides = {key: getattr(arguments, key) for key in ("rates", "methods", "seeds", "epochs")}
    chosen = replace(protocol, **{key: value for key, value in overrides.items() if value is not None})
    networks = arguments.networks or protocol.widths
    chosen = replace(chosen, widths={name: width for name, width in protocol.widths.items() if name in networks})
    longer = f"_{chosen.epochs}_epochs" if chosen.epochs != protocol.epochs else ""
    name = arguments.protocol if chosen.dataset == arguments.protocol else f"{chosen.dataset}_{arguments.protocol}"
    folder = arguments.results / f"{name}{longer}"
    status = 0
    try:
        if not arguments.only_table:
            folder.mkdir(parents=True, exist_ok=True)
            missing = [run for run in chosen.runs() if run.done(folder) is None]
            if missing:
                device = torch.device(arguments.device)
                source = chosen.dataset, Path(arguments.data_dir), chosen.train_size
                if arguments.together:
                    backend = "inductor" if arguments.compile else None
                    status = _work_together(missing, source, device, folder, arguments.together, backend)
                else:
                    jobs = arguments.jobs or ((os.cpu_count() or 1) if device.type == "cpu" else 4)
                    status = _work(missing, source, device, folder, jobs)
        found = cifar100_results.read(folder)
        if found:
            about = {DENSE: "the same recipe without zeros", **{name: method.about for name, method in METHODS.items()}}
            pictures = cifar100_pictures.write(found, chosen.drawn or list(about), folder, chosen.title)
            print(cifar100_results.write(found, about, folder, chosen.title, pictures))
        elif arguments.only_table:
            print(f"cifar100_table: no results in {folder}", file=sys.stderr)
            return 1
    except (UserError, ValueError) as error:
        print(f"cifar100_table: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"cifar100_table: failed: {reason(error)}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", choices=PROTOCOLS, default="paper")
    parser.add_argument(
        "--data-dir", default="data", help="folder of CIFAR-100; it is downloaded to it if it is missing (data)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=_count, help="number of parallel runs (4 on a GPU, one a core on a CPU)")
    parser.add_argument(
        "--together",
        type=_count,
        help="train this number of networks at once in one process, on a GPU in one CUDA graph; Ctrl-C waits for the "
        "end of an epoch",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="with --together: use torch.compile, which first takes a minute for each kind of network",
    )
    parser.add_argument("--networks", nargs="+", choices=PROTOCOLS["paper"].widths, help="only these")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these, in addition to the dense network")
    parser.add_argument("--rates", nargs="+", type=_rate, help="only these")
    parser.add_argument("--seeds", type=_count, help="only this number of seeds, from 0 on")
    parser.add_argument("--epochs", type=_count, help="another number of epochs; the results have another folder then")
    parser.add_argument(
        "--results",
        type=_folder,
        default=timing.RESULTS,
        help="parent of the folder of the runs and of the table (benchmarks/results)",
    )
    parser.add_argument("--only-table", action="store_true", help="only write the table of the existing results")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, got {text}")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0.0 < rate < 1.0:
        raise argparse.ArgumentTypeError(f"expected a fraction of zeros in (0, 1), got {text}")
    return rate


def _folder(text: str) -> Path:
    if os.path.exists(text) and not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"expected a folder, got the file {text}")
    return Path(text)


# A data set, its folder, and the number of its training images.
Source = tuple[str, Path, int | None]


def _groups(runs: Sequence[Run], folder: Path, count: int) -> list[list[Run]]:
    """Return the runs in groups of this number that train at once: first those that were stopped."""
    stopped = [group for group in together.unfinished(folder) if {*group} <= {*runs}]
    continued = {run for group in stopped for run in group}
    groups = stopped
    for network in dict.fromkeys(run.network for run in runs):
        own = [run for run in runs if run.network == network and run not in continued]
        groups += [own[first : first + count] for first in range(0, len(own), count)]
    return groups


def _work_together(
    runs: Sequence[Run], source: Source, device: torch.device, folder: Path, count: int, backend: str | None
) -> int:
    """Make the runs, some at once, and return the exit status."""
    data = load_data(*source).to(device)
    torch.backends.cudnn.benchmark = True
    chosen = [run for run in runs if possible(run)]
    steps = len(data.train) // BATCH
    total = sum(run.epochs for run in chosen) * steps
    with StopRequest() as request, tqdm(total=total, unit="step", desc="runs", smoothing=0.02) as bar:

        def stopped() -> bool:
            return request.signal is not None

        for group in _groups(chosen, folder, count):
            together.execute(group, data, device, folder, backend=backend, advance=bar.update, stopped=stopped)
            if request.signal is not None:
                print("stopped; the same command continues", file=sys.stderr)
                return 128 + request.signal
    if left := len(runs) - len(chosen):
        print(f"left out {left} runs that need the host at each step; make them without --together", file=sys.stderr)
    return 0


def _work(runs: Sequence[Run], source: Source, device: torch.device, folder: Path, jobs: int) -> int:
    """Make the runs in parallel jobs, with one progress bar, and return the exit status."""
    data = load_data(*source)  # loaded here first, so that a missing data set gives one message
    steps = -(-len(data.train) // BATCH)
    context = multiprocessing.get_context("spawn")
    progress, stop = context.Queue(), context.Event()
    failed: list[str] = []
    with (
        StopRequest() as request,
        ProcessPoolExecutor(jobs, context, _enter, (source, device, progress, stop)) as pool,
        tqdm(total=sum(run.epochs for run in runs) * steps, unit="step", desc="runs", smoothing=0.02) as bar,
    ):
        futures: dict[Future[bool], Run] = {pool.submit(_execute, run, folder): run for run in runs}
        waiting = set(futures)
        while waiting:
            bar.update(_received(progress))
            if request.signal is not None and not stop.is_set():
                stop.set()
                for future in futures:
                    future.cancel()
            for future in [future for future in waiting if future.done()]:
                waiting.discard(future)
                if not future.cancelled() and (error := future.exception()) is not None:
                    failed.append(f"{futures[future].name}: {error}")
                bar.set_postfix(done=f"{len(futures) - len(waiting)}/{len(futures)}", refresh=False)
    for message in failed:
        print(f"cifar100_table: failed: {message}", file=sys.stderr)
    if request.signal is not None:
        print("stopped; the same command continues", file=sys.stderr)
        return 128 + request.signal
    return 1 if failed else 0


def _received(progress: Any) -> int:
    """Wait a moment, and return the number of steps that the workers have made since the last call."""
    steps = 0
    with contextlib.suppress(queue.Empty):
        steps += progress.get(timeout=0.5)
        while True:
            steps += progress.get_nowait()
    return steps


# The state of a worker process.
_worker: dict[str, Any] = {}


def _enter(source: Source, device: torch.device, progress: Any, stop: Any) -> None:
    signals.leave_to_parent()
    torch.set_num_threads(1)  # parallel runs are faster than several threads for networks of this size
    data = load_data(*source).to(device)
    _worker.update(data=data, device=device, progress=progress, stop=stop)


def _execute(run: Run, folder: Path) -> bool:
    data: ImageData = _worker["data"]
    if _worker["stop"].is_set():
        return False
    return execute(run, data, _worker["device"], folder, _worker["progress"].put, _worker["stop"].is_set)


if __name__ == "__main__":
    raise SystemExit(signals.exit_status("cifar100_table", main))

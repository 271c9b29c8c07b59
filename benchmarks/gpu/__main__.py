"""All measurements of one GPU within a number of minutes: `python -m benchmarks.gpu --minutes 14 --out FOLDER`.

a. the tests that need a GPU; b. threshold, operator and whole steps; c. seconds of an epoch; d. whether a smaller p is
better after 160 epochs of CIFAR-100; e. the paper's table. The parts are made in this order, and each has a JSON file.
Parts d and e need --data. Nothing is started that is not expected to end in time. The same command continues. Ctrl-C
ends the piece at work if it trains, or waits for it; a second Ctrl-C does not wait.
"""

from __future__ import annotations

from feather_param.utils import signals

if __name__ == "__main__":
    signals.end_at_once()  # on Ctrl-C during the imports, which take seconds

import argparse
import gc
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks import timing
from benchmarks.gpu import budget, page
from benchmarks.gpu.parts import missing_data, parts
from benchmarks.gpu.publish import publish
from benchmarks.gpu.sizes import REAL, REHEARSAL
from examples.stop import StopRequest

RESERVE = 15.0  # seconds to start Python and torch, and to write the page


def main(argv: Sequence[str] | None = None, clock: Callable[[], float] = time.monotonic) -> int:
    """Make the pieces that fit, write the page, and return the exit status.

    0; 1 if something raised; 2 for wrong arguments; 128 + the signal that stopped it.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    _check(parser, arguments)
    sizes, device = (REHEARSAL if arguments.rehearse else REAL), torch.device(arguments.device)
    folder: Path = arguments.out
    try:
        chosen = parts(sizes, device, folder, arguments.data, arguments.parts)
        if arguments.plan:
            print(_plan(chosen, folder))
            return 0
        if arguments.publish:
            print(f"published {publish(folder)} runs to {timing.RESULTS / 'cifar100_paper'}")
            return 0
        if arguments.only_page:
            page.write(folder)
            return 0
        return _run(arguments, chosen, clock, sys.argv[1:] if argv is None else argv)
    except (ValueError, FileExistsError) as error:
        print(f"benchmarks.gpu: error: {error}", file=sys.stderr)
        return 2


def _run(
    arguments: argparse.Namespace, chosen: Sequence[budget.Part], clock: Callable[[], float], argv: Sequence[str]
) -> int:
    if arguments.parts is None and "d" not in {part.letter for part in chosen}:
        print("left out parts d and e: they need --data", file=sys.stderr)
    arguments.out.mkdir(parents=True, exist_ok=True)
    timing.set_commit(arguments.commit)
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, arguments.device == "cuda"
    good = True
    try:
        with StopRequest() as request, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "nothing survives|fewer survivors")
            call = budget.Call(60.0 * arguments.minutes - RESERVE, clock, lambda: request.signal is not None)
            say = partial(print, file=sys.stderr, flush=True)
            place = budget.Place(arguments.out, arguments.rehearse, timing.machine, timing.write_whole, say, _tidy)
            for i, part in enumerate(chosen):
                if not call.stopped():
                    good = budget.run(part, place, call) and good
                    good = _written(arguments.out, say) and good
                    if not (good or _answers(arguments.device) or part is chosen[-1]):
                        say("the GPU does not answer this process any more; a new one makes the later parts")
                        _start_again([*argv, "--parts", *(each.letter for each in chosen[i + 1 :])], call.left())
    finally:
        torch.backends.cudnn.benchmark = benchmark
        timing.set_commit("")
    print(f"written to {arguments.out / 'page.md'}", file=sys.stderr)
    if request.signal is not None:
        print("stopped; the same command continues", file=sys.stderr)
        return 128 + request.signal
    return 0 if good else 1


def _written(folder: Path, say: Callable[[str], object]) -> bool:
    """Write the page, and return whether that worked. A fault in it may not keep the parts from their time."""
    try:
        page.write(folder)
    except Exception as error:
        say(f"the page raised {type(error).__name__}: {error}")
        return False
    return True


def _answers(device: str) -> bool:
    """Return whether the device still computes. After some errors of a kernel, each call of the process raises."""
    try:
        return torch.ones((), device=device).item() == 1.0
    except RuntimeError:
        return False


def _start_again(argv: Sequence[str], seconds: float) -> NoReturn:
    """Replace this process by one with other arguments, which ends after as many seconds or at once."""
    minutes = max(seconds, 1.0) / 60 + RESERVE / 60
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *argv, "--minutes", f"{minutes:.3f}"])


def _tidy() -> None:
    """Free the memory of a piece."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _plan(chosen: Sequence[budget.Part], folder: Path) -> str:
    """Return a table of the pieces that are left, as if there were no limit of time."""
    rows = []
    for part in chosen:
        records = budget.read(folder / part.file)["pieces"]
        pieces = [piece for piece in part.plan(records, math.inf) if not budget.finished(records.get(piece.name))]
        rows += [[part.letter, piece.name, f"{piece.seconds:.0f}", piece.reason] for piece in pieces]
        rows.append([part.letter, f"**sum of {part.title}**", f"**{sum(piece.seconds for piece in pieces):.0f}**", ""])
    return timing.show(["part", "piece", "expected seconds", "why"], rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=_minutes, default=14.0, help="when the call ends (14)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (runs/gpu)")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-100, for parts d and e")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, for a test of all parts on any machine")
    parser.add_argument("--parts", nargs="+", choices=list(page.FILES), help="only these, in this order")
    parser.add_argument("--commit", default="", help="the commit of a copy of the tree without .git")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--plan", action="store_true", help="only print what is left to do, with its expected seconds")
    only.add_argument("--only-page", action="store_true", help="only write the page of the results in the folder")
    only.add_argument(
        "--publish",
        action="store_true",
        help="only copy the runs of d and e to benchmarks/results/cifar100_paper; no file there is replaced",
    )
    return parser


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with status 2 if the arguments do not fit together."""
    makes = not (arguments.plan or arguments.only_page or arguments.publish)
    if arguments.out.exists() and not arguments.out.is_dir():
        parser.error(f"argument --out: expected a folder, got the file {arguments.out}")
    if not makes and not arguments.plan and not arguments.out.is_dir():
        parser.error(f"argument --out: expected the folder of results, got {arguments.out}, which does not exist")
    if makes and arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: expected a GPU for cuda, got none; use --device cpu --rehearse")
    if makes and arguments.device == "cpu" and not arguments.rehearse:
        parser.error("argument --device: expected --rehearse with cpu, got none; the real sizes take hours there")
    if makes and not arguments.rehearse:
        asked = {*(arguments.parts or ())} & {"d", "e"}
        if arguments.data is None and asked:
            parser.error(f"argument --data: expected the folder of CIFAR-100 for part {min(asked)}, got none")
        if arguments.data is not None and (problem := missing_data(arguments.data)):
            parser.error(f"argument --data: {problem}")


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 60.0 * minutes > RESERVE or math.isinf(minutes):
        raise argparse.ArgumentTypeError(f"expected a number of minutes above {RESERVE / 60:g}, got {text}")
    return minutes


if __name__ == "__main__":
    raise SystemExit(signals.exit_status("benchmarks.gpu", main))

"""Train a network on handwritten digits twice, dense and to 95 % zeros, and compare: under two minutes on two cores.

    python examples/demo.py

The digits are part of scikit-learn. Writes the folders of both runs and the picture demo.png to runs/demo/.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository itself is not installed

from feather_param.utils import signals

if __name__ == "__main__":
    signals.end_at_once()  # on Ctrl-C during the imports, which take seconds

import signal

from examples.cifar100 import TrainingFailed, parse, train
from examples.resumable import save_picture
from examples.run_log import RunLog
from examples.script import reason
from examples.stop import Stopped, StopRequest
from feather_param.reports.figures import draw

FOLDER = Path("runs") / "demo"
RATE = 0.95
EPOCHS = 24


def main(epochs: int = EPOCHS) -> int:
    """Run the demo and return its exit status."""
    logs: dict[str, RunLog] = {}
    stop = StopRequest()
    try:
        for name, rate in (("dense", 0.0), ("sparse", RATE)):
            options = f"--dataset=digits --epochs={epochs} --ptarget={rate} --sname={name} --no-cuda"
            log = train(parse(options.split()), FOLDER, stop)
            assert log is not None  # this is the only process
            logs[name] = log
        print(table({name: log.results for name, log in logs.items()}))
        accuracy = {name: log.curve("accuracy") for name, log in logs.items()}
        sparse = logs["sparse"]
        title = f"resnet20 on handwritten digits: dense, and with {sparse.results['rate']:.0%} zeros"
        save_picture(draw(sparse.report, history=sparse.history, accuracy=accuracy, title=title), FOLDER / "demo.png")
        print(f"picture: {FOLDER / 'demo.png'}")
    except Stopped:
        print("stopped")
        return 128 + (stop.signal or signal.SIGINT)
    except (TrainingFailed, OSError) as error:
        print(f"demo.py: failed: {reason(error)}", file=sys.stderr)
        return 1
    return 0


def table(runs: dict[str, dict[str, float]]) -> str:
    """Return a table of the results of runs, by name."""
    lines = [("", "test accuracy", "zeros", "weights", "compressed file")]
    for name, run in runs.items():
        size = f"{run['bytes_compressed'] / 1e6:.2f} MB"
        lines.append((name, f"{run['accuracy']:.2%}", f"{run['zeros']:,}", f"{run['total']:,}", size))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


if __name__ == "__main__":
    raise SystemExit(signals.exit_status("demo.py", main))

"""Train a network on handwritten digits twice, dense and to 95 % zeros, and compare: under two minutes on two cores.

    python examples/demo.py

The digits come with scikit-learn. Writes runs/demo/demo.png, and both runs' folders beside it.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: it is not installed

from examples.checkpoints import StopRequest
from examples.cifar100 import Outcome, choose_device, train
from examples.datasets import load_data
from examples.pictures import draw_comparison
from examples.runlog import new_folder
from examples.settings import Settings
from examples.training import TrainingFailed

__all__ = ["comparison", "main"]

_FOLDER = Path("runs") / "demo"
_RATE = 0.95
_EPOCHS = 24


def main(epochs: int = _EPOCHS) -> int:
    """Run the demo and return its exit status."""
    outcomes: list[Outcome] = []
    try:
        with StopRequest() as stop:
            for name, rate in (("dense", 0.0), ("sparse", _RATE)):
                settings = Settings(dataset="digits", epochs=epochs, ptarget=rate, sname=name)
                data = load_data(settings.dataset, Path(settings.data_dir))
                device, _ = choose_device(settings)
                outcome = train(settings, data, device, new_folder(_FOLDER, name), stop)
                if outcome is None:
                    print("stopped")
                    return 128 + (stop.signal or signal.SIGINT)
                outcomes.append(outcome)
    except TrainingFailed as error:
        print(f"demo.py: failed: {error}", file=sys.stderr)
        return 1
    dense, sparse = outcomes
    print(comparison(dense, sparse))
    if sparse.report is not None:
        title = f"resnet20 on handwritten digits: dense, and with {sparse.baked.zeros / sparse.baked.total:.0%} zeros"
        draw_comparison(_FOLDER / "demo.png", title, dense.epochs, sparse.epochs, sparse.trace, sparse.report)
    print(f"picture: {_FOLDER / 'demo.png'}")
    return 0


def comparison(dense: Outcome, sparse: Outcome) -> str:
    """Return a table of two runs."""
    lines = [("", "test accuracy", "zeros", "weights", "compressed file")]
    for name, outcome in (("dense", dense), ("sparse", sparse)):
        baked = outcome.baked
        size = f"{baked.compressed / 1e6:.2f} MB"
        lines.append((name, f"{baked.score.accuracy:.2%}", f"{baked.zeros:,}", f"{baked.total:,}", size))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())

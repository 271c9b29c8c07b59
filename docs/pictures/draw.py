"""Draw the pictures of the pages from the library itself: `python docs/pictures/draw.py`.

They have a white background. The site inverts them in its dark scheme.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import nn

import feather_param
from feather_param import schedules
from feather_param.parametrizations import feather_threshold

FOLDER = Path(__file__).parent
BLUE, ORANGE, GREEN, GREY, PALE = "#2b6cb0", "#c05621", "#2f855a", "#718096", "#edf2f7"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "feather_param",  # the same file each time
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def operator() -> Figure:
    """Draw the operator for four exponents, with the threshold 1."""
    figure, axes = _axes(7.5, 4.0)
    w = torch.linspace(-2.5, 2.5, 2001, dtype=torch.float64)
    for p, name, colour in (
        (0.5, "p = 1/2", GREEN),
        (1, "p = 1", ORANGE),
        (3, "p = 3", BLUE),
        (math.inf, "p = inf", GREY),
    ):
        y = feather_threshold(w, torch.tensor(1.0, dtype=torch.float64), p=p)
        axes.plot(w, y, color=colour, label=name, linewidth=2)
    for t in (-1, 1):
        axes.axvline(t, color=GREY, linewidth=1, linestyle=":")
    axes.text(1.03, -2.4, "threshold", color=GREY)
    axes.set(xlabel="dense weight w, in multiples of the threshold", ylabel="P(w)")
    axes.legend(frameon=False)
    return figure


def rates() -> Figure:
    """Draw the rate at each step of a training to 95 %, with each schedule and the default `end_step`."""
    figure, axes = _axes(7.5, 3.2)
    for schedule, colour in ((schedules.cubic, BLUE), (schedules.linear, ORANGE), (schedules.constant, GREY)):
        rate = [0.95 * schedule(min(step / 100, 1.0)) for step in range(201)]
        axes.plot(rate, color=colour, label=schedule.__name__, linewidth=2)
    axes.set(xlabel="optimizer step, of 200", ylabel="rate", ylim=(-0.02, 1))
    axes.legend(frameon=False, loc="lower right")
    return figure


def histogram() -> Figure:
    """Draw the dense weights of a small network after a training to 90 % zeros, and the threshold."""
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    y = (x[:, :4].square().sum(1) > 4).long()
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=120)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        controller.step()
    originals = [value for name, value in model.named_parameters() if name.endswith("weight.original")]
    dense, t = torch.cat([each.detach().flatten() for each in originals]), float(controller.threshold)
    figure, axes = _axes(7.5, 3.4)
    most = float(dense.abs().quantile(0.995))
    width = t / 12
    edges = [width * i for i in range(-math.ceil(most / width), math.ceil(most / width) + 1)]
    values = dense.tolist()
    axes.hist([v for v in values if abs(v) <= t], edges, color=GREY, label=f"{100 * controller.rate:.0f} % pruned")
    axes.hist([v for v in values if abs(v) > t], edges, color=BLUE, label=f"{100 - 100 * controller.rate:.0f} % kept")
    for place in (-t, t):
        axes.axvline(place, color=ORANGE, linewidth=1.5, label="threshold" if place > 0 else None)
    axes.set(xlabel="dense weight w", ylabel="elements")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


def state() -> Figure:
    """Draw what `sparsify` registers on a model, and who reads and writes it."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    feather_param.sparsify(model, final_rate=0.75, total_steps=4)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    figure, axes = _axes(9.0, 4.4)
    axes.set(xlim=(0, 100), ylim=(0, 50))
    axes.set_axis_off()
    for x, layer in zip((2, 38), layers, strict=True):
        _box(axes, x, 35, 30, 12, f"layer {layer}", "dense weight: a Parameter,\ntrained by the optimizer", "white")
        _box(axes, x, 17, 30, 11, "FeatherParametrization", "layer.weight = P(dense weight)", PALE)
        _arrow(axes, (x + 15, 35), (x + 15, 28.6))
        _arrow(axes, (x + 15, 12), (x + 15, 16.6), "threshold")
    _box(
        axes,
        2,
        1,
        66,
        11,
        "shared state, one for the model",
        "thresholds; step and number of zeros (saved in model.state_dict())",
        PALE,
    )
    _box(axes, 78, 1, 20, 11, "Controller", "step()", "white")
    _arrow(axes, (78, 6.5), (69, 6.5), "writes")
    return figure


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure((width, height), layout="constrained", facecolor="white")
    return figure, figure.add_subplot()


def _box(axes: Axes, x: float, y: float, width: float, height: float, title: str, text: str, colour: str) -> None:
    axes.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=1", fc=colour, ec=GREY))
    axes.text(x + width / 2, y + height - 1.5, title, ha="center", va="top", weight="bold")
    axes.text(x + width / 2, y + 1.5, text, ha="center", va="bottom", size=11)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": BLUE, "linewidth": 1.5})
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    upright = start[0] == end[0]
    axes.text(
        middle[0] + upright, middle[1] + (not upright), text, size=11, color=BLUE, ha="left" if upright else "center"
    )


PICTURES = {"operator": operator, "schedules": rates, "histogram": histogram, "state": state}


def main(folder: Path = FOLDER) -> None:
    """Write each picture into a folder."""
    folder.mkdir(exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, draw in PICTURES.items():
            draw().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

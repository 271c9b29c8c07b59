"""The pictures of the CIFAR-100 runs."""

from __future__ import annotations

import math

import pytest
from matplotlib.figure import Figure

from benchmarks import cifar100_pictures
from benchmarks.methods import DENSE
from tests.benchmarks.results import made_up


@pytest.mark.parametrize("rates", [[], [0.9], [0.9, 0.98, 0.99]])
def test_every_rate_is_well_inside_the_picture(rates):
    axes = Figure().subplots()
    found = {(DENSE, 0.0): [70.0], **{("feather", rate): [60.0] for rate in rates}}
    cifar100_pictures._accuracy(axes, found, ["feather"])
    left, right = axes.get_xlim()
    logits = [math.log(rate / (1 - rate)) for rate in rates]
    assert axes.get_xticks().tolist() == logits
    assert all(left + 0.4 < at < right - 0.4 for at in logits)


def test_a_method_has_the_same_colour_for_a_network_that_lacks_the_others():
    axes = Figure().subplots()
    cifar100_pictures._accuracy(axes, {("soft", 0.9): [60.0]}, ["feather", "soft"])
    (drawn,) = axes.containers
    assert drawn.get_label() == "p = 1 (soft)"
    assert drawn.lines[0].get_color() == "C1"


def layers(*survivors: int) -> list[dict[str, object]]:
    return [{"name": f"{i}.weight", "size": 100, "survivors": n, "outputs": 10} for i, n in enumerate(survivors)]


def test_survivors_are_drawn_per_output_as_the_mean_over_the_seeds():
    results = [made_up("feather", 0.98, seed, 0.5, layers=layers(20 + 10 * seed, 0, 3)) for seed in range(2)]
    axes = Figure().subplots()
    cifar100_pictures._survivors(axes, results)
    line, dead, one = axes.lines
    assert line.get_ydata() == pytest.approx([2.5, math.nan, 0.3], nan_ok=True)
    assert list(dead.get_xdata()) == [1]
    assert list(one.get_ydata()) == [1.0, 1.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2"]


def test_the_picture_of_the_layers_needs_runs_that_list_them(tmp_path):
    old = [made_up("feather", 0.98, 0, 0.5)]
    assert list(cifar100_pictures.write(old, ["feather"], tmp_path / "old", "Images")) == ["old.png"]
    new = [made_up("feather", 0.98, 0, 0.5, layers=layers(20, 0)), made_up("p_0.5", 0.995, 0, 0.5, layers=layers(9, 1))]
    written = cifar100_pictures.write(new, ["feather", "p_0.5"], tmp_path / "new", "Images")
    assert list(written) == ["new.png", "new_layers.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"old.png", *written}
    assert all((tmp_path / name).stat().st_size > 10_000 for name in written)

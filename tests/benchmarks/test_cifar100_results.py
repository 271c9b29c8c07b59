"""The page of the CIFAR-100 runs."""

from __future__ import annotations

import pytest

from benchmarks import cifar100_results
from benchmarks.methods import DENSE
from tests.benchmarks.results import made_up


def test_the_table_shows_means_deviations_and_differences(tmp_path):
    results = [made_up(DENSE, 0.0, seed, 0.70 + 0.02 * seed) for seed in range(2)]
    results += [made_up("feather", 0.9, seed, 0.68 + 0.02 * seed) for seed in range(2)]
    results += [made_up("hard", 0.99, 0, 0.5, dead=["conv.weight"])]
    about = {DENSE: "no zeros", "feather": "ours", "hard": "another"}
    text = cifar100_results.write(results, about, tmp_path / "table", "Images", {"table.png": "a picture"})
    assert text.startswith("# Images, 160 epochs, all training images\n")
    assert "![a picture](table.png)" in text
    assert (tmp_path / "table.md").read_text() == text
    assert "| dense | 71.00 ± 1.41 |  |" in text
    assert "| feather | 69.00 ± 1.41 [-2.00] | not run |" in text
    assert "| hard | not run | 50.00 (n = 1) [-21.00] |" in text
    assert "exactly the promised one in each of the 5 runs; runs with layers without survivors: 1 of 1 of hard." in text
    results[-1]["zeros"] += 1
    assert "NOT the promised one" in cifar100_results.write(results, about, tmp_path / "table", "Images", {})


@pytest.mark.parametrize(
    ("network", "width", "heading"),
    [
        ("resnet20", 16, "## resnet20, widths 16, 32, 64"),
        ("mobilenet_v1", 0.5, "## mobilenet_v1, width 0.5"),
        ("densenet", 0, "## densenet"),
    ],
)
def test_the_page_names_the_width_of_a_network(network, width, heading, tmp_path):
    result = made_up("feather", 0.9, 0, 0.5)
    result["run"].update(network=network, width=width)
    page = cifar100_results.write([result], {"feather": "ours"}, tmp_path / "table", "Images", {})
    assert heading in page.splitlines()

"""The bench times a network that a function builds."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from feather_param.cli import architecture
from tests.cli.commands import BENCH, done, fails


def test_bench_times_the_network(run):
    weight = torch.where(torch.rand(40, 50) < 0.9, 0.0, torch.randn(40, 50))
    torch.save({"module.weight": weight}, "in.pt")  # as DDP names it
    rows = json.loads(done(run("bench", "in.pt", *BENCH, "--input", "2x50", "--json")))["rows"]
    assert [(row["shape"], row["rate"]) for row in rows] == [
        ([40, 50], pytest.approx(float((weight == 0).sum()) / 2000))
    ]
    assert rows[0]["dense_ms"] > 0
    fails(run("bench", "in.pt", *BENCH, "--input", "2x51"), 1, "with an input of (2, 51)")
    fails(
        run("bench", "in.pt", *BENCH[:3], "out_features=3", "--input", "2x50"),
        1,
        "expected the weights of this network",
    )


def test_bench_loads_the_weights_of_a_wrapped_network(run):
    torch.manual_seed(0)
    weight = torch.where(torch.rand(40, 50) < 0.9, 0.0, torch.randn(40, 50))
    for wrappers in (
        "",
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "_checkpoint_wrapped_module.",
    ):
        network = architecture.build("torch.nn:Linear", BENCH[2:])
        architecture.load(network, {f"{wrappers}weight": weight})
        assert torch.equal(network.weight, weight), wrappers


def test_weights_load_into_a_network_of_which_a_part_is_compiled():
    def network() -> nn.Module:
        return nn.Sequential(torch.compile(nn.Linear(3, 2)), nn.Linear(2, 2))

    state = network().state_dict()
    for tensors in (state, {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}):
        loaded = network()
        architecture.load(loaded, tensors)
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())

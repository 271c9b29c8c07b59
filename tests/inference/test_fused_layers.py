"""A fused layer is its equation, and random graphs give the outputs of the model."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from feather_param.inference.fusing.fuse import ACTIVATIONS, FusedLayer
from tests.inference.graphs import ROWS, X, agree, bn, conv, graph_of, measured_norms, seq, summary


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [None, (2, 4, 6, 6), (4, 1, 1), (3, 2, 4, 6, 6)])
def test_a_fused_layer_is_its_equation(activation, shape):
    layer = FusedLayer(conv(), activation)
    residual = None if shape is None else torch.randn(shape)
    modules = {"relu": nn.ReLU(), "relu6": nn.ReLU6(), "silu": nn.SiLU(), "hardswish": nn.Hardswish()}
    apply = {**modules, "gelu": nn.GELU(), "identity": nn.Identity()}[activation]
    with torch.no_grad():
        expected = apply(layer.layer(X) + (0.0 if residual is None else residual))
        assert torch.equal(layer(X, residual), expected)


def test_a_sample_without_batch_is_not_taken_for_a_batch():
    model, sample = measured_norms(seq(nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6))), torch.randn(4, 6)
    graph = graph_of(model, sample)  # the norm takes the sample for six rows of six channels
    assert summary(graph) == (1, 0, "identity")
    assert torch.allclose(graph(sample), model(sample), atol=1e-6)
    with pytest.raises(ValueError, match="expected an input of 3 dimensions for the batch norm, got 2"):
        graph_of(model, sample[None])(sample)


def test_a_fused_layer_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"expected activation to be one of identity, relu, .*, got 'tanh'"):
        FusedLayer(conv(), "tanh")
    graph = graph_of(measured_norms(seq(nn.Linear(4, 4), nn.BatchNorm1d(4))), ROWS)
    with pytest.raises(ValueError, match="expected an input of 2 dimensions for the batch norm, got 3"):
        graph(torch.randn(2, 4, 4))


KINDS = ("layer", "layer", "norm", "relu", "relu_", "silu", "+", "+=", "view", "dropout")
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), *[st.integers(0, 2)] * 3), min_size=2, max_size=10)


class Program(nn.Module):
    """Compute a list of tensors, each from earlier ones, and give back the last two."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList([conv() for _ in range(3)])
        self.norms = nn.ModuleList([bn() for _ in range(3)])
        self.relu = nn.ReLU(True)
        self.dropout = nn.Dropout()

    def forward(self, x):
        values = [x * 1]
        for kind, which, back, further in self.steps:
            a, b = values[-1 - back % len(values)], values[-1 - (back + further) % len(values)]
            if kind == "layer":
                values.append(self.layers[which](a))
            elif kind == "norm":
                values.append(self.norms[which](a))
            elif kind in ("+", "+="):
                values.append(a + b if kind == "+" else operator.iadd(a, b))
            elif kind == "view":
                values.append(a.view(-1, 4, 6, 6))
            else:
                call = {"relu": F.relu, "relu_": self.relu, "silu": F.silu, "dropout": self.dropout}[kind]
                values.append(call(a))
        return values[-1], values[-2]


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_random_graphs(steps):
    agree(measured_norms(Program(steps)), X)

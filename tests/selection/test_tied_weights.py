"""Tensors that several layers share, and layers that a model uses twice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import feather_param
from feather_param.parametrizations import states_of
from feather_param.selection.select import select
from tests.selection.models import names


class TiedHead(nn.Module):
    """A small language model whose head shares the tensor of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.body(self.embed(x)))


class TiedLayers(nn.Module):
    """Layers `a` and `b` share a weight, and layer `c` is also called `again`."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.c = nn.Linear(4, 4)
        self.again = self.c

    def forward(self, x):
        return self.again(self.c(self.b(self.a(x))))


def test_a_tied_weight_counts_once_and_stays_tied():
    selection = select(TiedLayers())
    assert names(selection) == ["a.weight", "c.weight"]
    assert [place.name for place in selection.weights[0].places] == ["a.weight", "b.weight"]
    model = TiedLayers()
    controller = feather_param.sparsify(model, final_rate=0.75, total_steps=1, end_step=0)
    assert controller.report().total == 32
    assert torch.equal(model.a.weight, model.b.weight)
    feather_param.desparsify(model)
    assert model.a.weight is model.b.weight
    assert int((model.a.weight == 0).sum() + (model.c.weight == 0).sum()) == 24


def test_a_layer_that_is_used_twice_is_matched_by_both_names():
    assert names(select(TiedLayers(), include="again")) == ["c.weight"]


def test_a_weight_tied_to_an_embedding_stays_dense_with_a_warning_and_a_reason():
    model = TiedHead()
    with pytest.warns(
        UserWarning, match=r"prunes only 16 of the 56 elements .* the largest being embed\.weight with 40; name"
    ):
        controller = feather_param.sparsify(model, final_rate=0.5, total_steps=2, end_step=0)
    assert controller.report().skipped["head.weight"] == "tied to embed.weight, which is not selected"
    assert "dense: head.weight (tied to embed.weight, which is not selected)" in str(controller.report())
    feather_param.desparsify(model)
    assert model.head.weight is model.embed.weight
    assert int((model.head.weight == 0).sum()) == 0


def test_a_head_and_its_tied_embedding_are_pruned_if_include_names_both():
    model = TiedHead()
    controller = feather_param.sparsify(
        model, final_rate=0.5, total_steps=2, end_step=0, include=["embed.weight", "head"]
    )
    assert controller.report().total == 40
    feather_param.desparsify(model)
    assert model.head.weight is model.embed.weight
    assert int((model.head.weight == 0).sum()) == 20


def test_all_places_of_a_tied_weight_are_registered_under_its_name():
    model = TiedLayers()
    feather_param.sparsify(model, final_rate=0.5, total_steps=2)
    (shared,) = states_of(model)
    assert [(each.name, each.place.name) for each in shared.registrations.values()] == [
        ("a.weight", "a.weight"),
        ("a.weight", "b.weight"),
        ("c.weight", "c.weight"),
    ]

"""Which weights are pruned, and what is refused."""

from __future__ import annotations

import ast
import re

import pytest
import torch
from torch import nn

import feather_param
from feather_param.parametrizations import states_of
from feather_param.selection.select import select


def names(selection) -> list[str]:
    return [weight.name for weight in selection.weights]


class Head(nn.Module):
    """A language model in miniature: the head shares the embedding's tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.body(self.embed(x)))


class Twice(nn.Module):
    """Two layers sharing one weight, and one layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.c = nn.Linear(4, 4)
        self.again = self.c

    def forward(self, x):
        return self.again(self.c(self.b(self.a(x))))


class MyLinear(nn.Linear):
    pass


LAYERS = [
    nn.Linear(4, 4),
    MyLinear(4, 4),
    nn.Conv1d(4, 4, 3, dilation=2, padding="same", padding_mode="circular"),
    nn.Conv2d(4, 4, 3, groups=2, padding=1, padding_mode="reflect"),
    nn.Conv3d(4, 4, 3, stride=2),
    nn.ConvTranspose1d(4, 4, 3, output_padding=1, stride=2),
    nn.ConvTranspose2d(4, 4, 3, groups=4),
    nn.ConvTranspose3d(4, 4, 3, bias=False),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_a_root_layer_is_selected_and_behaves_as_with_the_thresholded_weight(layer):
    x = torch.randn(2, *(4,) * layer.weight.dim())[:, :4] if layer.weight.dim() > 2 else torch.randn(2, 4)
    if layer.weight.dim() > 2:
        x = torch.randn(2, 4, *(6,) * (layer.weight.dim() - 2))
    plain = type(layer)
    controller = feather_param.sparsify(layer, final_rate=0.5, total_steps=2, schedule=feather_param.schedules.constant)
    assert isinstance(layer, plain)
    out = layer(x)
    assert [row.name for row in controller.report().rows] == ["weight"]
    feather_param.desparsify(layer)
    assert type(layer) is plain
    assert torch.equal(layer(x), out)
    assert int((layer.weight == 0).sum()) == round(0.5 * layer.weight.numel())


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        nn.Embedding(3, 3),
    )


TABLE = [
    ({}, ["0.weight", "2.0.weight", "2.2.weight"]),
    ({"include": "2.*"}, ["2.0.weight", "2.2.weight"]),
    ({"include": ["0", "2.2.weight"]}, ["0.weight", "2.2.weight"]),
    ({"exclude": "0"}, ["2.0.weight", "2.2.weight"]),
    ({"exclude": ("*.0.weight", "0.weight")}, ["2.2.weight"]),
    ({"include": "*", "exclude": "2*"}, ["0.weight"]),
    ({"min_params": 17}, ["0.weight", "2.0.weight"]),
    ({"include": lambda name, module: isinstance(module, nn.Linear)}, ["2.0.weight", "2.2.weight"]),
    ({"exclude": lambda name, module: name.startswith("2")}, ["0.weight"]),
    ({"include": "3.weight"}, ["3.weight"]),
    ({"include": "*.weight"}, ["0.weight", "2.0.weight", "2.2.weight", "3.weight"]),
]


@pytest.mark.parametrize(("arguments", "expected"), TABLE)
def test_include_exclude_min_params(arguments, expected):
    assert names(select(net(), **arguments)) == expected


class Named(nn.Module):
    """Layers whose weights are pruned only by name, beside others."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(3, 4)
        self.lstm = nn.LSTM(4, 4)
        self.att = nn.MultiheadAttention(4, 2)
        self.pair = nn.ParameterDict({"left": nn.Parameter(torch.ones(2, 2)), "right": nn.Parameter(torch.ones(2, 2))})
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ModuleDict({"emb2": nn.Embedding(2, 4)}))
        self.fc = nn.Linear(4, 4)


HINTS = [
    ("lstm", "'lstm' is of type LSTM, whose weights are pruned only if include names them: include='lstm.weight_*'"),
    ("lstm.*", "'lstm' is of type LSTM, whose weights are pruned only if include names them: include='lstm.weight_*'"),
    ("emb", "'emb' is of type Embedding, whose weights are pruned only if include names them: include='emb.weight'"),
    ("emb2", "'body.2.emb2' is of type Embedding, .*: include='*.emb2.weight'"),
    ("pair", "'pair' is of type ParameterDict, .*: include=['pair.left', 'pair.right']"),
    ("body", "did you mean 'body.*'?"),
    ("*.fc", "did you mean 'fc'?"),
    ("0.weight", "did you mean '*.0.weight'?"),
    ("body.1", "'body.1.weight' has fewer than two dimensions, and such Parameters (biases, norms) stay dense"),
    ("nowhere", "some of this model's names: att.in_proj_weight, att.out_proj.weight, body.0.weight"),
]


@pytest.mark.parametrize(("pattern", "hint"), HINTS)
def test_a_pattern_that_matches_nothing_is_answered_by_one_that_does(pattern, hint):
    with pytest.raises(ValueError, match=re.escape(hint).replace(r"\.\*:", ".*:")):
        select(Named(), include=pattern)
    if found := re.search(r"include=(.*)|mean (.*)\?", hint):
        assert names(select(Named(), include=ast.literal_eval(found[1] or found[2])))


def test_an_excluded_layer_that_is_dense_anyway_is_told_of():
    with pytest.raises(ValueError, match="'lstm' is of type LSTM, which stays dense unless include names it"):
        select(Named(), exclude="lstm")


def test_a_model_whose_weights_are_all_pruned_only_by_name_is_told_how():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(5, 4)
            self.h = nn.ModuleList(nn.ModuleDict({"mix": nn.Bilinear(4, 4, 4)}) for _ in range(4))
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.wte.weight

    with pytest.raises(ValueError, match=r"with none: head\.weight \(tied to wte\.weight, .*'\*\.mix\.weight' \(5 in"):
        feather_param.plan(Tied(), final_rate=0.5)
    assert len(select(Tied(), include="*.mix.weight").weights) == 4


def test_every_layer_is_selected_or_skipped_with_a_reason():
    selection = select(net(), include=["0", "2.2"], min_params=17)
    assert names(selection) == ["0.weight"]
    assert selection.skipped == {"2.0.weight": "not included", "2.2.weight": "fewer than 17 parameters"}
    opt_in = {"3.weight": "a weight of Embedding: name it in include to prune it"}
    assert select(net(), exclude="0").skipped == {"0.weight": "excluded", **opt_in}


def test_tied_weights_count_once():
    selection = select(Twice())
    assert names(selection) == ["a.weight", "c.weight"]
    assert [place.name for place in selection.weights[0].places] == ["a.weight", "b.weight"]
    model = Twice()
    controller = feather_param.sparsify(model, final_rate=0.75, total_steps=1, end_step=0)
    assert controller.report().total == 32
    assert torch.equal(model.a.weight, model.b.weight)
    feather_param.desparsify(model)
    assert model.a.weight is model.b.weight
    assert int((model.a.weight == 0).sum() + (model.c.weight == 0).sum()) == 24


def test_a_layer_in_two_places_answers_to_both_names():
    assert names(select(Twice(), include="again")) == ["c.weight"]


def test_a_weight_tied_to_an_unselected_layer_stays_dense_and_is_named():
    model = Head()
    with pytest.warns(
        UserWarning, match=r"takes 16 of the 56 elements .* the largest being embed\.weight with 40; name"
    ):
        controller = feather_param.sparsify(model, final_rate=0.5, total_steps=2, end_step=0)
    assert controller.report().skipped["head.weight"] == "tied to embed.weight, which is not selected"
    assert "dense: head.weight (tied to embed.weight, which is not selected)" in str(controller.report())
    feather_param.desparsify(model)
    assert model.head.weight is model.embed.weight
    assert int((model.head.weight == 0).sum()) == 0


def test_a_tied_pair_may_be_opted_in_as_a_whole():
    model = Head()
    controller = feather_param.sparsify(
        model, final_rate=0.5, total_steps=2, end_step=0, include=["embed.weight", "head"]
    )
    assert controller.report().total == 40
    feather_param.desparsify(model)
    assert model.head.weight is model.embed.weight
    assert int((model.head.weight == 0).sum()) == 20


def test_all_places_of_a_weight_are_found_again():
    model = Twice()
    feather_param.sparsify(model, final_rate=0.5, total_steps=2)
    (shared,) = states_of(model)
    assert [(each.weight, each.place.name) for each in shared.registrations.values()] == [
        ("a.weight", "a.weight"),
        ("a.weight", "b.weight"),
        ("c.weight", "c.weight"),
    ]


def test_a_pattern_may_exclude_what_is_not_included():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "fc": nn.Linear(3, 3)})
    selection = select(model, include="a", exclude="fc")
    assert [weight.name for weight in selection.weights] == ["a.weight"]

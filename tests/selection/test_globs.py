"""The arguments `include`, `exclude` and `min_params`, and the hints for globs that match nothing."""

from __future__ import annotations

import ast
import re

import pytest
from torch import nn

from feather_param.selection.select import select
from tests.selection.models import ManyKinds, names, small_net

FILTERS = [
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


@pytest.mark.parametrize(("arguments", "expected"), FILTERS)
def test_include_exclude_and_min_params_select_weights(arguments, expected):
    assert names(select(small_net(), **arguments)) == expected


def test_a_glob_may_exclude_a_weight_that_is_not_included():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "fc": nn.Linear(3, 3)})
    assert names(select(model, include="a", exclude="fc")) == ["a.weight"]


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


@pytest.mark.parametrize(("glob", "hint"), HINTS)
def test_a_glob_that_matches_no_weight_is_refused_with_a_glob_that_matches(glob, hint):
    with pytest.raises(ValueError, match=re.escape(hint).replace(r"\.\*:", ".*:")):
        select(ManyKinds(), include=glob)
    if proposed := re.search(r"include=(.*)|mean (.*)\?", hint):
        assert names(select(ManyKinds(), include=ast.literal_eval(proposed[1] or proposed[2])))


def test_excluding_a_layer_that_stays_dense_by_default_is_refused():
    with pytest.raises(ValueError, match="'lstm' is of type LSTM, which stays dense unless include names it"):
        select(ManyKinds(), exclude="lstm")

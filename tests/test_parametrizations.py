"""The parametrization on a layer: its threshold, assignments to the weight, copies and traces."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import feather_param
from feather_param.core.budget import Budget
from feather_param.core.config import Config
from feather_param.core.shared import SharedSparsity
from feather_param.parametrizations import FeatherParametrization
from tests.network import net


def sparse_linear(threshold: float = 0.5) -> nn.Module:
    layer = nn.Linear(4, 3)
    feather = FeatherParametrization(SharedSparsity(Config(final_rate=0.5), Budget({"weight": 12})))
    feather.threshold.fill_(threshold)
    parametrize.register_parametrization(layer, "weight", feather)
    return layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_of_the_layer_does_not_round_its_threshold(dtype):
    layer = sparse_linear(1 / 3).to(dtype)
    assert layer.parametrizations.weight[0].threshold == torch.tensor(1 / 3)
    assert layer.weight.dtype == dtype


def test_the_threshold_moves_to_another_device_with_the_layer():
    layer = sparse_linear().to("meta")
    assert layer.parametrizations.weight[0].threshold.device.type == "meta"


def test_a_deepcopy_has_a_threshold_of_its_own():
    layer = sparse_linear()
    twin = copy.deepcopy(layer)
    layer.parametrizations.weight[0].threshold.fill_(9.0)
    assert twin.parametrizations.weight[0].threshold == 0.5
    assert (layer.weight == 0).all()
    assert torch.equal(twin.weight == 0, twin.parametrizations.weight.original.abs() <= 0.5)


def test_an_assignment_to_the_weight_sets_the_dense_weight():
    layer = sparse_linear(0.5)
    layer.weight = torch.full((3, 4), 0.25)
    assert (layer.parametrizations.weight.original == 0.25).all()
    assert (layer.weight == 0).all()


def test_only_an_assignment_of_a_tensor_changes_the_dense_weight():
    model = net()
    feather_param.sparsify(model, final_rate=0.9, total_steps=4, end_step=0)
    dense = model[4].parametrizations.weight.original
    before = dense.detach().clone()
    nn.init.ones_(model[4].weight)  # writes to a temporary tensor: each access computes the pruned weight again
    model[4].reset_parameters()
    assert torch.equal(dense, before)
    with pytest.raises(KeyError):
        model[4].weight = nn.Parameter(torch.ones(4, 16))
    model[4].weight = torch.ones(4, 16)
    assert torch.equal(dense, torch.ones(4, 16))


def test_the_repr_names_the_settings():
    assert "p=3.0, theta=1.0" in repr(sparse_linear())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("features", [10, 200], ids=["small", "large"])
def test_a_sparsified_model_can_be_traced_and_exported(features):
    model = nn.Sequential(nn.Linear(features, features), nn.ReLU())
    feather_param.sparsify(model, final_rate=0.9, total_steps=1, end_step=0)
    x = torch.randn(3, features)
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))
    program = torch.export.export(model, (x,))
    assert torch.allclose(program.module()(x), model(x), atol=1e-6)

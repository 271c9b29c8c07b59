"""The buffers of a sparse layer: which they are, and that the layer computes with those that it has."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from feather_param.inference.fusing.fuse import FusedLayer
from feather_param.inference.layers import SparseLayer
from tests.inference.pruned import assert_computes_the_same, pruned


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_blocks_of_four_rows_are_found():
    layer = nn.Linear(6, 8)
    layer.weight.data.view(2, 4, 6)[0, :, 1:] = 0
    layer.weight.data.view(2, 4, 6)[1, :, :4] = 0
    sparse = SparseLayer(layer)
    assert sparse.rows == 4
    assert sparse.columns.tolist() == [0, 4, 5]
    assert sparse.weight.to_dense().equal(layer.weight)
    assert_computes_the_same(sparse, layer, torch.randn(3, 6))


def test_the_tables_of_few_sizes_are_kept():
    sparse = SparseLayer(pruned(nn.Linear(4, 5)))
    for n in range(1, 100):
        sparse(torch.randn(n, 4))
    assert len(sparse._plans) == 16


@pytest.mark.parametrize("layer", [nn.Linear(4, 6, bias=False), nn.Conv2d(4, 6, (3, 5), 2, "valid", groups=2)])
def test_code_may_read_the_sizes_of_the_layer(layer):
    sparse = SparseLayer(layer)
    for name in layer.__constants__:
        assert getattr(sparse, name) == getattr(layer, name)


def test_replaced_buffers_are_used():
    sparse, x = SparseLayer(pruned(nn.Linear(6, 5))), torch.randn(2, 6)
    sparse(x)
    sparse.values = torch.zeros_like(sparse.values)
    assert torch.equal(sparse(x), sparse.bias.expand(2, 5))
    sparse.bias.zero_()
    assert not sparse(x).any()


@pytest.mark.parametrize("assign", [False, True])
def test_the_state_of_another_layer_of_this_form_can_be_loaded(assign):
    first, second = nn.Linear(6, 8), nn.Linear(6, 8)
    first.weight.data[:, ::2] = 0
    second.weight.data[:, 1::2] = 0
    sparse, x = SparseLayer(first), torch.randn(1, 6)
    sparse(x)
    sparse.load_state_dict(SparseLayer(second).state_dict(), assign=assign)
    assert_computes_the_same(sparse, second, x)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("columns", lambda t: t + 1),
        ("columns", lambda t: t - 1),
        ("columns", lambda t: t.long()),
        ("columns", lambda t: t[1:]),
        ("block_start", lambda t: t + 1),
        ("block_start", lambda t: -t),
        ("block_start", lambda t: t[1:]),
        ("block_start", lambda t: t.float()),
        ("bias", lambda t: t[1:]),
        ("bias", lambda t: t.double()),
        ("values", lambda t: t[1:]),
    ],
)
def test_buffers_that_do_not_belong_together_are_refused(name, change):
    sparse = SparseLayer(nn.Linear(6, 5))
    setattr(sparse, name, change(getattr(sparse, name)))
    for x in (torch.randn(1, 6), torch.randn(3, 6)):
        with pytest.raises(ValueError, match="expected buffers that belong together"):
            sparse(x)


def test_a_model_whose_buffers_are_all_cast_is_refused():
    with pytest.raises(ValueError, match="expected buffers that belong together"):
        SparseLayer(pruned(nn.Linear(6, 6))).type(torch.float32)(torch.randn(2, 6))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_compute_the_same(copied):
    sparse, x = SparseLayer(FusedLayer(pruned(nn.Conv2d(4, 8, 3)), "silu")), torch.randn(1, 4, 9, 9)
    expected = sparse(x)
    twin = copied(sparse)
    assert not twin._plans
    assert torch.equal(twin(x), expected)


def test_hooks_run_once():
    layer, calls = SparseLayer(FusedLayer(pruned(nn.Linear(4, 4)), "relu")), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 4)
    layer(x, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x, x)
    assert len(calls) == 2


def test_the_repr_shows_sizes_and_the_activation():
    linear, conv = pruned(nn.Linear(6, 4), 1.0), pruned(nn.Conv1d(6, 4, 3), 1.0)
    assert repr(SparseLayer(FusedLayer(linear, "relu"))) == "SparseLayer(6, 4, nonzeros=0, activation='relu')"
    assert repr(SparseLayer(conv)) == "SparseLayer(6, 4, window=(3,), nonzeros=0, activation='identity')"


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 8), nn.Conv2d(4, 8, 3, groups=2), nn.Conv1d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8)]
)
def test_the_weight_is_a_sparse_matrix_of_the_whole_weight(layer):
    layer = pruned(layer, 0.5)
    weight = SparseLayer(layer).weight
    assert weight.layout == torch.sparse_bsr
    assert (weight.dtype, weight.device.type) == (torch.float32, "cpu")
    groups = getattr(layer, "groups", 1)
    parts = [part.flatten(1) for part in layer.weight.chunk(groups)]
    assert torch.equal(weight.to_dense(), torch.block_diag(*parts))

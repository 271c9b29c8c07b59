"""The multiply-adds of layers are those counted by hand, and those of networks are the published ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import feather_param
from feather_param.reports import LayerMultiplyAdds, multiply_adds
from tests.reports.models import loss, network, started
from tests.training import train

# Each line: a layer, the shape of its input, and the number of positions that it applies its weight to, by hand.
LAYERS = [
    (nn.Linear(5, 3), (2, 5), 2),
    (nn.Linear(5, 3), (2, 7, 5), 14),
    (nn.Linear(5, 3), (5,), 1),
    (nn.Conv2d(3, 8, 3), (1, 3, 6, 6), 16),  # 4 x 4 positions of the output
    (nn.Conv2d(3, 8, 3, padding=1), (1, 3, 6, 6), 36),
    (nn.Conv2d(3, 8, 3, padding=1, stride=2), (1, 3, 6, 6), 9),
    (nn.Conv2d(3, 8, 3, dilation=2), (1, 3, 6, 6), 4),
    (nn.Conv2d(4, 8, 3, groups=2), (5, 4, 6, 6), 80),
    (nn.Conv2d(6, 6, (3, 1), groups=6), (1, 6, 6, 6), 24),  # depthwise, 4 x 6
    (nn.Conv1d(2, 3, 4), (1, 2, 10), 7),
    (nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 5), 48),  # 2 x (2 x 3 x 4)
    (nn.ConvTranspose2d(3, 8, 3), (1, 3, 4, 4), 16),  # 4 x 4 positions of the input
    (nn.ConvTranspose2d(3, 8, 3, stride=2, padding=1), (2, 3, 4, 4), 32),
    (nn.ConvTranspose2d(4, 8, 3, groups=2), (1, 4, 4, 4), 16),
    (nn.ConvTranspose1d(2, 3, 4, stride=3), (1, 2, 10), 10),
    (nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 4, 5), 60),
]


@pytest.mark.parametrize(("layer", "shape", "uses"), LAYERS, ids=lambda value: str(value)[:40])
def test_multiply_adds_of_a_layer(layer, shape, uses):
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight.flatten()[::3] = 0.0
    kept = layer.weight.numel() - -(-layer.weight.numel() // 3)
    found = multiply_adds(layer, torch.randn(shape))
    assert found.rows == (LayerMultiplyAdds("weight", tuple(layer.weight.shape), uses, kept),)
    assert (found.dense, found.remaining) == (uses * layer.weight.numel(), uses * kept)


def test_multiply_adds_of_known_networks():
    torchvision = pytest.importorskip("torchvision")
    for builder, published in ((torchvision.models.resnet18, 1.814e9), (torchvision.models.mobilenet_v3_small, 56.5e6)):
        weights = next(iter(torchvision.models.get_model_weights(builder)))
        with torch.device("meta"):
            model = builder()
        found = multiply_adds(model.to_empty(device="cpu"), torch.zeros(1, 3, 224, 224))
        assert found.dense == pytest.approx(published, rel=1e-2)
        assert weights.meta["_ops"] == pytest.approx(found.dense / 1e9, rel=1e-2)  # torchvision's own count


def test_multiply_adds_of_a_sparsified_model_are_those_of_the_baked_one():
    model, optimizer, controller = started()
    train(model, loss, controller, range(7), optimizer)
    x = torch.zeros(2, 3, 5, 5)
    sparse = multiply_adds(model, x)
    feather_param.desparsify(model)
    assert sparse == multiply_adds(model, x)
    assert sparse.dense == 2 * 25 * 162 + 2 * 1050
    assert sparse.remaining < 0.5 * sparse.dense


def test_multiply_adds_leave_the_model_as_it_was():
    model = network()
    model[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    multiply_adds(model, torch.randn(4, 3, 5, 5))
    with pytest.raises(RuntimeError):
        multiply_adds(model, torch.randn(4, 1))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(TypeError, match=r"expected model to be an nn\.Module, got int"):
        multiply_adds(3, torch.randn(4))  # type: ignore[arg-type]


def test_multiply_adds_name_what_they_do_not_count():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "lstm": nn.LSTM(8, 4), "out": nn.Linear(4, 2)})
    model["unused"] = nn.Linear(2, 2)

    def forward(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return model["out"](input=model["lstm"](model["attention"](query, value, value)[0])[0])

    model.forward = forward
    for sparse in (False, True):
        if sparse:
            feather_param.sparsify(model, final_rate=0.5, total_steps=1, include=["*", "attention.in_proj_weight"])
        x = torch.randn(3, 1, 8)
        for example in ((x, x), {"query": x, "value": x}):
            found = multiply_adds(model, example)
            assert [(row.name, row.uses) for row in found.rows] == [("out.weight", 3)]
            assert found.uncounted == {
                "attention.in_proj_weight": "a weight of MultiheadAttention",
                "attention.out_proj.weight": "its layer is not called in this pass",
                "lstm.weight_ih_l0": "a weight of LSTM",
                "lstm.weight_hh_l0": "a weight of LSTM",
                "unused.weight": "its layer is not called in this pass",
            }
    assert "not counted: lstm.weight_ih_l0 (a weight of LSTM)" in str(found)


def test_a_layer_called_twice_counts_twice():
    layer = nn.Linear(3, 3)
    assert multiply_adds(nn.Sequential(layer, layer), torch.zeros(2, 3)).dense == 2 * 2 * 9

"""Which weights are pruned by default, and the reasons why others stay dense."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import feather_param
from feather_param.selection.select import select
from tests.selection.models import names, small_net


class LinearSubclass(nn.Linear):
    pass


LAYERS = [
    nn.Linear(4, 4),
    LinearSubclass(4, 4),
    nn.Conv1d(4, 4, 3, dilation=2, padding="same", padding_mode="circular"),
    nn.Conv2d(4, 4, 3, groups=2, padding=1, padding_mode="reflect"),
    nn.Conv3d(4, 4, 3, stride=2),
    nn.ConvTranspose1d(4, 4, 3, output_padding=1, stride=2),
    nn.ConvTranspose2d(4, 4, 3, groups=4),
    nn.ConvTranspose3d(4, 4, 3, bias=False),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_a_single_layer_is_selected_and_computes_the_same_after_desparsify(layer):
    x = torch.randn(2, 4, *(6,) * (layer.weight.dim() - 2))
    plain = type(layer)
    controller = feather_param.sparsify(layer, final_rate=0.5, total_steps=2, schedule=feather_param.schedules.constant)
    assert isinstance(layer, plain)
    output = layer(x)
    assert [row.name for row in controller.report().rows] == ["weight"]
    feather_param.desparsify(layer)
    assert type(layer) is plain
    assert torch.equal(layer(x), output)
    assert int((layer.weight == 0).sum()) == round(0.5 * layer.weight.numel())


def test_the_input_projections_of_attention_are_selected():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=2, end_step=0)
    found = [row.name for row in controller.report().rows]
    assert found == ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    separate = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    found = [row.name for row in feather_param.plan(separate, final_rate=0.5).rows]
    assert found == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    assert len(feather_param.plan(nn.MultiheadAttention(8, 2), final_rate=0.5).rows) == 2


def test_each_skipped_weight_has_a_reason():
    selection = select(small_net(), include=["0", "2.2"], min_params=17)
    assert names(selection) == ["0.weight"]
    assert selection.skipped == {"2.0.weight": "not included", "2.2.weight": "fewer than 17 parameters"}
    embedding = {"3.weight": "a weight of Embedding: name it in include to prune it"}
    assert select(small_net(), exclude="0").skipped == {"0.weight": "excluded", **embedding}


class OtherLayer(nn.Module):
    """A layer that is no Linear and has a weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))


def test_a_warning_says_that_most_elements_stay_dense_unless_an_argument_asks_for_it():
    def sparsify(model, **arguments):
        feather_param.sparsify(model, final_rate=0.5, total_steps=2, end_step=0, **arguments)

    def model():
        return nn.ModuleDict({"fc": nn.Linear(8, 8), "big": OtherLayer(32, 32)})

    with pytest.warns(
        UserWarning, match=r"prunes only 64 of the 1,088 elements .* being big\.weight with 1,024; name them in"
    ):
        sparsify(model())
    sparsify(model(), include="fc")
    sparsify(model(), include="*.weight")
    sparsify(nn.ModuleDict({"fc": nn.Linear(8, 8), "other": nn.Linear(32, 32)}), exclude="other")
    sparsify(nn.ModuleDict({"fc": nn.Linear(8, 8), "big": OtherLayer(7, 9)}))


def test_a_model_with_no_weight_to_prune_is_refused_with_a_glob_that_selects_some():
    class TiedAndBilinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(5, 4)
            self.h = nn.ModuleList(nn.ModuleDict({"mix": nn.Bilinear(4, 4, 4)}) for _ in range(4))
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.wte.weight

    with pytest.raises(ValueError, match=r"with none: head\.weight \(tied to wte\.weight, .*'\*\.mix\.weight' \(5 in"):
        feather_param.plan(TiedAndBilinear(), final_rate=0.5)
    assert len(select(TiedAndBilinear(), include="*.mix.weight").weights) == 4

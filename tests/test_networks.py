"""Networks of torchvision, transformers and torch are trained and baked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import feather_param
from feather_param import schedules
from tests.training import keys, train, zeros_after_baking


@pytest.mark.filterwarnings("ignore:nothing survives")
@pytest.mark.parametrize("arch", ["resnet50", "mobilenet_v3_small", "vit_b_16", "convnext_tiny"])
def test_a_network_of_torchvision_is_baked_to_the_exact_number_of_zeros(arch):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    size = {"vit_b_16": {"image_size": 32}}.get(arch, {})
    model = getattr(models, arch)(weights=None, num_classes=10, **size)
    before = keys(model)
    include = ["*.in_proj_weight", "*"] if arch == "vit_b_16" else None
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=5, include=include)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    train(model, lambda model, step: nn.functional.cross_entropy(model(x), y), controller, optimizer=sgd)
    total = controller.report().total
    assert zeros_after_baking(model) == (round(0.9 * total), total)
    assert keys(model) == before


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config), ["*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight"]


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    return transformers.BertForMaskedLM(config), None


@pytest.mark.filterwarnings("ignore:sparsify prunes only")  # the embeddings are the largest matrices of so small a BERT
@pytest.mark.parametrize("make", [gpt2, bert])
def test_a_language_model_has_the_same_outputs_after_desparsify_and_from_pretrained(make, tmp_path):
    torch.manual_seed(0)
    model, include = make()
    before = keys(model)
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=5, include=include)
    tokens = torch.randint(64, (2, 12))
    train(model, lambda model, step: model(input_ids=tokens, labels=tokens).loss, controller)
    total = controller.report().total
    out = model.eval()(input_ids=tokens).logits
    model.save_pretrained(tmp_path, state_dict=feather_param.baked_state_dict(model))
    assert zeros_after_baking(model) == (round(0.9 * total), total)
    assert keys(model) == before
    # Kept ties are the smallest numbers of the dtype then. At most, sums are in another order.
    torch.testing.assert_close(model(input_ids=tokens).logits, out)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, out)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:nothing survives")
def test_the_fast_path_of_attention_uses_the_pruned_weights():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    feather_param.sparsify(
        model,
        final_rate=0.8,
        total_steps=1,
        end_step=0,
        schedule=schedules.constant,
        include=["*.in_proj_weight", "*.linear?", "*.out_proj"],
    )
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    slow = model(x, src_key_padding_mask=padding)  # with gradients, torch takes no fast path
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=padding)
        feather_param.desparsify(model)
        baked = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(fast, baked)
    torch.testing.assert_close(fast[~padding], slow.detach()[~padding], rtol=1e-4, atol=1e-5)

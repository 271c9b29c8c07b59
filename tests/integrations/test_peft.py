"""docs/trainers/peft.md, with peft itself."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import feather_param
from tests.integrations.digits import TOTAL, Network, digits, network, outputs, run_page, zeros

peft = pytest.importorskip("peft", reason="peft is missing: pip install 'feather_param[integrations]'")

from feather_param.integrations.peft import SparseLora, keep_zeros  # noqa: E402 # needs peft

KEPT = round(0.9 * TOTAL)
CLOSE = {"rtol": 0.0, "atol": 1e-5}  # a merge adds the products in another order


def sparse_network() -> Network:
    model = network()
    feather_param.sparsify(model, final_rate=0.9, total_steps=1, end_step=0)
    feather_param.desparsify(model)
    return model


def config(**changes) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["body", "head"], "init_lora_weights": False, **changes})


def adapted(**changes) -> peft.PeftModel:
    """Return a sparse network with random adapters that keep its zeros."""
    torch.manual_seed(1)
    return peft.get_peft_model(sparse_network(), keep_zeros(config(**changes)))


def train(model: nn.Module, controller: feather_param.Controller | None = None, steps: int = 4) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, y = digits(64).tensors
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if controller is not None:
            controller.step()


@pytest.fixture(scope="module", name="scope")
def _scope(tmp_path_factory):
    """The variables of the page after its code ran."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("peft"))
        feather_param.save_sparse(sparse_network(), "sparse.safetensors")
        scope = {"build": network, "train": train, "total": 4, "torch": torch}
        adapter = run_page("peft.md", scope, [0])
        merged = copy.deepcopy(adapter["merged"])
        yield {
            **run_page("peft.md", scope, [1, 2]),
            "adapted": merged,
            "file": feather_param.load_sparse("adapted.safetensors"),
        }


def test_the_code_of_the_page_keeps_the_zeros(scope):
    base = sparse_network()
    assert zeros(scope["adapted"]) == zeros(scope["file"]) == KEPT
    assert not torch.equal(scope["adapted"].body.weight, base.body.weight)
    assert zeros(scope["merged"]) == KEPT


def test_an_adapter_that_is_loaded_again_computes_the_same(tmp_path):
    model = adapted()
    model.save_pretrained(str(tmp_path))
    again = keep_zeros(peft.LoraConfig.from_pretrained(str(tmp_path)))
    loaded = peft.PeftModel.from_pretrained(sparse_network(), str(tmp_path), config=again)
    assert torch.equal(outputs(loaded), outputs(model))
    without = peft.PeftModel.from_pretrained(sparse_network(), str(tmp_path))
    assert not torch.allclose(outputs(without), outputs(model), atol=1e-2)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.5}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
def test_a_merge_changes_neither_the_outputs_nor_the_zeros(changes, safe):
    model = adapted(**changes)
    train(model)
    before = outputs(model)
    with model.disable_adapter():
        assert not torch.allclose(outputs(model), before, atol=0.1)
    merged = model.merge_and_unload(safe_merge=safe)
    torch.testing.assert_close(outputs(merged), before, **CLOSE)
    assert zeros(merged) == KEPT
    assert type(merged.body) is nn.Linear


def test_an_adapter_can_be_merged_and_unmerged():
    model = adapted()
    before = outputs(model)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model), before, **CLOSE)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model), before, **CLOSE)


def test_several_adapters_keep_the_zeros():
    model = adapted()
    model.add_adapter("second", config())
    first = outputs(model)
    model.set_adapter("second")
    second = outputs(model)
    assert not torch.allclose(first, second, atol=0.1)
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    assert zeros(merged) == KEPT
    assert not torch.allclose(outputs(merged), second, atol=0.1)


def test_half_precision_keeps_the_zeros():
    model = adapted().to(torch.bfloat16)
    with torch.no_grad():
        before = model.eval()(digits(8).tensors[0].bfloat16())
        merged = model.merge_and_unload()
        assert before.dtype == torch.bfloat16
        torch.testing.assert_close(merged(digits(8).tensors[0].bfloat16()), before, rtol=0.05, atol=0.05)
    assert zeros(merged) == KEPT


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: keep_zeros(config(init_lora_weights="pissa")), "got 'pissa', which may change the base weights"),
        (
            lambda: keep_zeros(config(target_parameters=["body.weight"])),
            "got target_parameters; name the Linear layers",
        ),
        (lambda: adapted(use_dora=True), "expected plain LoRA, got DoraLinearVariant"),
        (
            lambda: adapted().eval()(digits(2).tensors[0], adapter_names=["default", "__base__"]),
            "run one batch for each",
        ),
    ],
)
def test_an_adapter_that_cannot_be_masked_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_layer_that_is_not_linear_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 4, 3))
    with pytest.raises(TypeError, match=r"expected target_modules to name Linear layers .*, got Conv2d"):
        peft.get_peft_model(model, keep_zeros(peft.LoraConfig(target_modules=["0"])))


def test_a_plain_adapter_keeps_the_zeros_until_it_is_merged():
    model = peft.get_peft_model(sparse_network(), config())
    train(model)
    before = outputs(model)
    layers = model.base_model.model
    masks = {name: getattr(layers, name).base_layer.weight != 0 for name in ("body", "head")}
    assert sum(int((~mask).sum()) for mask in masks.values()) == KEPT
    merged = model.merge_and_unload()
    assert zeros(merged) < 0.01 * TOTAL
    with torch.no_grad():  # the zeros set again
        for name, mask in masks.items():
            getattr(merged, name).weight.mul_(mask)
    assert not torch.allclose(outputs(merged), before, atol=0.1)


def test_the_copy_of_a_layer_in_modules_to_save_loses_its_zeros_in_training():
    model = adapted(target_modules=["body"], modules_to_save=["head"])
    train(model)
    merged = model.merge_and_unload()
    assert int((merged.head.weight == 0).sum()) < 0.1 * merged.head.weight.numel()
    assert int((merged.body.weight == 0).sum()) > 0


def pruned_with_adapters(**filters: str) -> tuple[peft.PeftModel, feather_param.Controller]:
    torch.manual_seed(1)
    model = peft.get_peft_model(network(), keep_zeros(config(target_modules=["body"], modules_to_save=["head"])))
    return model, feather_param.sparsify(model, final_rate=0.9, total_steps=1, end_step=0, **filters)


def test_adapters_stay_dense_with_the_reason():
    model = peft.get_peft_model(network(), config(target_modules=["body"], modules_to_save=["head"]))
    plan = feather_param.plan(model, final_rate=0.9)
    prefix = "base_model.model."
    pruned = [f"{prefix}body.base_layer.weight", f"{prefix}head.modules_to_save.default.weight"]
    assert [row.name for row in plan.rows] == pruned
    assert {name.removeprefix(prefix): why.partition(":")[0] for name, why in plan.skipped.items()} == {
        "body.lora_A.default.weight": "a low-rank adapter",
        "body.lora_B.default.weight": "a low-rank adapter",
        "head.original_module.weight": "replaced by the copy in modules_to_save",
    }
    more = feather_param.plan(model, final_rate=0.9, include=["*", "*.lora_A.*.weight"])
    assert sorted(row.name for row in more.rows) == sorted([*pruned, f"{prefix}body.lora_A.default.weight"])


def test_a_merge_into_a_sparsified_model_is_refused_and_works_after_desparsify():
    model, _ = pruned_with_adapters()
    train(model)
    before = outputs(model)
    with pytest.raises(RuntimeError, match="expected a plain layer to merge adapters into, got a sparsified one"):
        model.merge_and_unload()
    feather_param.desparsify(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged), before, **CLOSE)
    assert zeros(merged) == KEPT


def test_a_merge_of_a_plain_adapter_into_a_sparsified_model_is_lost():
    base = network()
    feather_param.sparsify(base, final_rate=0.9, total_steps=1, end_step=0)
    without = outputs(base)
    model = peft.get_peft_model(base, config())
    assert not torch.allclose(outputs(model), without, atol=0.1)
    assert torch.equal(outputs(model.merge_and_unload()), without)


def test_sparsify_may_come_before_the_adapters():
    base = network()
    controller = feather_param.sparsify(base, final_rate=0.9, total_steps=1, end_step=0)
    model = peft.get_peft_model(base, keep_zeros(config()))
    assert controller.report().zeros == KEPT
    before = outputs(model)
    feather_param.desparsify(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged), before, **CLOSE)
    assert zeros(merged) == KEPT


def test_the_state_dict_of_the_model_resumes_the_schedule():
    def built():
        model = peft.get_peft_model(network(), config(target_modules=["body"], modules_to_save=["head"]))
        return model, feather_param.sparsify(model, final_rate=0.9, total_steps=8)

    (model, controller), (again, resumed) = built(), built()
    for _ in range(3):
        controller.step()
    again.load_state_dict(model.state_dict())
    assert resumed.step_count == 3
    assert torch.equal(outputs(again), outputs(model))


def test_a_pruned_layer_in_modules_to_save_is_neither_loaded_nor_copied_before_desparsify(tmp_path):
    model, _ = pruned_with_adapters()
    model.save_pretrained(str(tmp_path))
    with pytest.raises(KeyError):
        peft.PeftModel.from_pretrained(network(), str(tmp_path))
    assert isinstance(copy.deepcopy(model).base_model.model.head, nn.Linear)  # and not peft's wrapper


def test_a_dense_layer_in_modules_to_save_is_saved_and_copied_during_training(tmp_path):
    model, _ = pruned_with_adapters(exclude="*modules_to_save*")
    train(model)
    assert torch.equal(outputs(copy.deepcopy(model)), outputs(model))
    model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(network(), str(tmp_path))
    heads = [each.base_model.model.head.modules_to_save["default"] for each in (model, loaded)]
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_the_layers_have_the_class_of_the_page():
    assert type(adapted().base_model.model.body) is SparseLora

"""The layers that peft adds stay dense by default. tests/integrations/test_peft.py has the same with peft itself."""

from __future__ import annotations

import warnings

import pytest
from torch import nn

import feather_param
from feather_param.selection.select import select
from tests.selection.models import names


def adapted() -> nn.Module:
    """Return a network with the names that peft gives: an adapter on ``body``, and ``head`` in modules_to_save."""
    body = nn.ModuleDict(
        {
            "base_layer": nn.Linear(8, 8),
            "lora_A": nn.ModuleDict({"default": nn.Linear(8, 2)}),
            "lora_B": nn.ModuleDict({"default": nn.Linear(2, 8)}),
        }
    )
    copies = nn.ModuleDict({"default": nn.Linear(8, 4)})
    head = nn.ModuleDict({"original_module": nn.Linear(8, 4), "modules_to_save": copies})
    return nn.ModuleDict({"body": body, "head": head})


DENSE = {
    "body.lora_A.default.weight": "a low-rank adapter: name it in include to prune it",
    "body.lora_B.default.weight": "a low-rank adapter: name it in include to prune it",
    "head.original_module.weight": "replaced by the copy in modules_to_save: name it in include to prune it",
}
PRUNED = ["body.base_layer.weight", "head.modules_to_save.default.weight"]


def test_adapters_and_replaced_originals_stay_dense_with_the_reason():
    plan = feather_param.plan(adapted(), final_rate=0.5)
    assert [row.name for row in plan.rows] == PRUNED
    assert plan.skipped == DENSE
    assert "a low-rank adapter" in str(plan)


def test_adapters_stay_dense_with_include_star_and_a_predicate():
    assert names(select(adapted(), include="*")) == PRUNED
    assert names(select(adapted(), include=lambda name, module: isinstance(module, nn.Linear))) == PRUNED


def test_adapters_are_pruned_if_include_names_their_weights():
    found = names(select(adapted(), include=["*", "*.lora_?.default.weight"]))
    assert found == [PRUNED[0], "body.lora_A.default.weight", "body.lora_B.default.weight", PRUNED[1]]


def test_adapters_may_also_be_excluded():
    assert names(select(adapted(), exclude=["*lora_*", "*original_module*"])) == PRUNED


def test_an_include_that_names_the_layer_of_an_adapter_is_refused_with_a_glob_that_selects_it():
    with pytest.raises(ValueError, match=r"'body.lora_A.default' is of type Linear, .*include='\*lora_A\*.weight'"):
        select(adapted(), include="*lora_A*")


def test_large_adapters_do_not_warn_of_dense_weights():
    model = adapted()
    model["body"]["lora_A"]["default"] = nn.Linear(8, 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feather_param.sparsify(model, final_rate=0.5, total_steps=1)


def test_an_original_module_without_modules_to_save_is_pruned():
    assert names(select(nn.ModuleDict({"original_module": nn.Linear(4, 4)}))) == ["original_module.weight"]


def test_an_adapter_alone_is_pruned():
    assert names(select(adapted()["body"]["lora_A"])) == ["default.weight"]


def test_layers_of_ones_own_with_lora_in_their_names_are_pruned():
    model = nn.ModuleDict({"lora_encoder": nn.Linear(8, 8), "lora": nn.ModuleDict({"head": nn.Linear(8, 4)})})
    assert names(select(model)) == ["lora_encoder.weight", "lora.head.weight"]

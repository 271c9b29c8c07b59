"""The symptoms of docs/troubleshooting.md: each message in a heading is provoked, and the remedy is tried."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import feather_param

PAGE = (Path(__file__).parent.parent / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^### `(.*?)`$", PAGE, re.MULTILINE)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def sparsified(**settings: object) -> tuple[nn.Sequential, feather_param.Controller]:
    model = network()
    return model, feather_param.sparsify(model, **{"final_rate": 0.5, "total_steps": 4, "end_step": 0, **settings})


def mostly_embeddings() -> None:
    feather_param.sparsify(nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 16)), final_rate=0.5, total_steps=4)


def a_glob_without_a_star() -> None:
    sparsified(exclude="layer4")


def sparsified_into_plain() -> None:
    network().load_state_dict(sparsified()[0].state_dict())


def pickled() -> None:
    torch.save(sparsified()[0], "model.pt")


def other_settings() -> None:
    sparsified(final_rate=0.6)[1].load_state_dict(sparsified()[1].state_dict())


def collected_after_sparsify() -> None:
    model, controller = sparsified(total_steps=20)
    found = [module.weight for module in model if isinstance(getattr(module, "weight", None), nn.Parameter)]
    optimizer = torch.optim.SGD([*found, model[0].bias], lr=0.1)
    for _ in range(12):
        model(torch.ones(1, 16)).sum().backward()
        optimizer.step()
        controller.step()


def diverged() -> None:
    model, controller = sparsified()
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(torch.nan)
    controller.step()


def both_ways_to_step() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    feather_param.sparsify(model, final_rate=0.5, total_steps=4, optimizer=optimizer).step()


def stepped_after_desparsify() -> None:
    model, controller = sparsified()
    feather_param.desparsify(model)
    controller.step()


def replaced() -> None:
    model, controller = sparsified()
    model[2] = nn.Linear(32, 4)
    controller.step()


def wrapped_before() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        feather_param.sparsify(nn.parallel.DistributedDataParallel(network()), final_rate=0.5, total_steps=4)
    finally:
        torch.distributed.destroy_process_group()


CAUSES: dict[str, Callable[[], None]] = {
    "sparsify prunes only": mostly_embeddings,
    "expected exclude to match a weight": a_glob_without_a_star,
    "Missing key(s) in state_dict": sparsified_into_plain,
    "Serialization of parametrized modules is only supported through state_dict()": pickled,
    "expected a controller state with final_rate=": other_settings,
    "the optimizer does not hold them": collected_after_sparsify,
    "expected finite weights, got NaN or infinity": diverged,
    "expected step() not to be called": both_ways_to_step,
    "expected step() before desparsify, got it after": stepped_after_desparsify,
    "the layer was replaced, or the parametrization was removed": replaced,
    "expected a model that is not yet wrapped": wrapped_before,
}


def test_each_message_in_a_heading_has_a_test():
    assert sorted(QUOTED) == sorted([*CAUSES, "newly initialized"])


@pytest.mark.parametrize("message", CAUSES)
def test_a_message_in_a_heading_has_the_cause_that_the_page_names(message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((RuntimeError, ValueError, UserWarning), match=re.escape(message)):
        CAUSES[message]()


def test_transformers_initialises_the_weights_of_a_sparsified_checkpoint_and_loads_a_baked_one(tmp_path):
    transformers = pytest.importorskip("transformers", reason="this symptom needs feather_param[integrations]")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **sizes))
    feather_param.sparsify(model, final_rate=0.8, total_steps=1, end_step=0)
    baked = feather_param.baked_state_dict(model)

    model.save_pretrained(tmp_path / "sparsified")
    _, told = transformers.BertModel.from_pretrained(tmp_path / "sparsified", output_loading_info=True)
    assert "pooler.dense.weight" in told["missing_keys"]  # these are the ones that are "newly initialized"

    model.save_pretrained(tmp_path / "baked", state_dict=dict(baked))  # it empties the dictionary
    loaded = transformers.BertModel.from_pretrained(tmp_path / "baked")
    assert all(torch.equal(value, baked[name]) for name, value in loaded.state_dict().items())


def test_the_missing_and_the_unexpected_keys_have_the_names_of_the_page():
    with pytest.raises(
        RuntimeError, match=r"Missing key\(s\)(.|\n)*\.weight\"(.|\n)*parametrizations\.weight\.original"
    ):
        sparsified_into_plain()


def test_fewer_zeros_than_asked_comes_with_a_warning_and_freeze_stops_early_on_purpose():
    model, controller = sparsified(end_step=4)
    controller.step()
    with pytest.warns(UserWarning, match=r"expected desparsify\(\) after the 320 zeros of final_rate are reached"):
        feather_param.desparsify(model)

    model, controller = sparsified(end_step=4)
    controller.step()
    controller.freeze()
    feather_param.desparsify(model)


def test_weights_that_are_zero_before_are_the_reason_for_more_zeros_than_asked():
    model = network()
    nn.init.zeros_(model[0].weight)
    feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0)
    with pytest.warns(UserWarning, match="nothing survives"):
        feather_param.desparsify(model)
    assert int((model[0].weight == 0).sum()) == 512 > round(0.5 * 640)


def test_an_optimizer_that_steps_after_desparsify_loses_the_zeros_and_warns():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    feather_param.sparsify(model, final_rate=0.5, total_steps=4, end_step=0, optimizer=optimizer)
    feather_param.desparsify(model)
    model(torch.ones(1, 16)).sum().backward()
    with pytest.warns(UserWarning, match="this optimizer has just stepped a model that was desparsified"):
        optimizer.step()


@pytest.mark.parametrize("p", [0.5, 1.0, 3.0, float("inf")])
def test_desparsify_does_not_change_the_outputs(p):
    model, _ = sparsified(p=p)
    x = torch.randn(8, 16)
    before = model(x)
    feather_param.desparsify(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("remedy", ["eval", "refresh"])
def test_a_write_through_data_is_seen_after_the_remedy(remedy):
    model, controller = sparsified()
    model.eval()
    x = torch.randn(8, 16)
    model(x)
    for value in model.parameters():
        value.data.mul_(torch.rand_like(value) * 3)
    model.eval() if remedy == "eval" else controller.refresh()
    before = model(x)
    feather_param.desparsify(model)
    assert torch.equal(model(x), before)


def test_a_compiled_model_whose_weights_were_swapped_needs_refresh():
    model, controller = sparsified()
    x = torch.randn(8, 16)
    compiled = torch.compile(model.eval(), backend="eager")
    compiled(x)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(torch.rand_like(value) * 3)
    stale = compiled(x)
    controller.refresh()
    before = compiled(x)
    feather_param.desparsify(model)
    assert (model(x) - before).abs().max() < 1e-5  # compiled weights differ by a few ulp
    assert (model(x) - stale).abs().max() > 0.1


def test_init_has_no_effect_and_an_assignment_has():
    model, _ = sparsified()
    nn.init.zeros_(model[0].weight)
    assert model[0].weight.count_nonzero()
    model[0].weight = torch.ones(32, 16)
    assert torch.equal(model[0].parametrizations["weight"].original, torch.ones(32, 16))
    with pytest.raises(KeyError, match="attribute 'weight' already exists"):
        model[0].weight = nn.Parameter(torch.ones(32, 16))


def test_the_state_dict_of_a_sparsified_model_is_saved_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="expected baked weights, got the state_dict of a sparsified model"):
        feather_param.save_sparse(sparsified()[0].state_dict(), tmp_path / "model.safetensors")

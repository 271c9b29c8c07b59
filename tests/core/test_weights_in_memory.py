"""Weights of unusual memory: tables of kinds and calls. Each call is exact, or is refused and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import feather_param
from tests.core.models import sparsify_at_once
from tests.training import all_equal, keys, same_state, zeros_in

Change = Callable[[nn.Sequential], object]

OWN_ELEMENTS = r"expected a weight whose elements have their own memory, got 0\.weight of .*; replace it with a copy"
OWN_MEMORY = r"expected a weight with its own memory, got 0\.weight, which shares memory with [12]\.weight; if they are"
ORDINARY = r"expected an ordinary tensor at 0\.weight, got .*; replace it with a copy"
VALUES = r"expected weights with values, or on the meta device, got 0\.weight with freed memory; load them first"


def linears() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def weights(*cuts: Callable[[Tensor], Tensor]) -> Change:
    """Return a change of a model that replaces its weights by parts of one buffer of 256 elements."""

    def change(model: nn.Sequential) -> None:
        buffer = numbers(256)
        for layer, cut in zip(model, cuts, strict=False):
            layer.weight = nn.Parameter(cut(buffer))

    return change


def in_inference_mode(model: nn.Sequential) -> None:
    with torch.inference_mode():
        model[0].weight = nn.Parameter(numbers(8, 8), requires_grad=False)


def normed_in_inference_mode(model: nn.Sequential) -> None:
    with torch.inference_mode():
        model[0] = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))


def in_the_memory_of_an_embedding(model: nn.Sequential) -> None:
    model.append(nn.Embedding(8, 8))
    model[0].weight.data = model[2].weight.data


def with_an_empty_weight(model: nn.Sequential) -> None:
    model.append(nn.Linear(8, 8)).get_submodule("2").weight = nn.Parameter(torch.ones(0, 8))


REFUSED: dict[str, tuple[Change, str]] = {
    "expanded": (weights(lambda b: b[:8, None].expand(8, 8)), OWN_ELEMENTS),
    "one number": (weights(lambda b: b[0].expand(8, 8)), OWN_ELEMENTS),
    "windows": (weights(lambda b: b.as_strided((8, 8), (4, 1))), OWN_ELEMENTS),
    "strides 7 and 3": (weights(lambda b: b.as_strided((8, 8), (7, 3))), OWN_ELEMENTS),
    "overlapping rows": (weights(lambda b: b[:64].view(8, 8), lambda b: b[60:124].view(8, 8)), OWN_MEMORY),
    "the same memory": (weights(*[lambda b: b[:64].view(8, 8)] * 2), OWN_MEMORY),
    "overlapping columns": (weights(lambda b: b.view(16, 16)[:8, :8], lambda b: b.view(16, 16)[:8, 7:15]), OWN_MEMORY),
    "memory of a dense weight": (in_the_memory_of_an_embedding, OWN_MEMORY),
    "inference tensor": (in_inference_mode, ORDINARY),
    "normed inference tensor": (normed_in_inference_mode, ORDINARY),
    "negative view": (weights(lambda b: torch._neg_view(b[:64].view(8, 8))), ORDINARY),
    "sparse": (weights(lambda b: b[:64].view(8, 8).to_sparse_csr()), ORDINARY),
    "freed": (lambda model: model[0].weight.untyped_storage().resize_(0), VALUES),
}
EXACT: dict[str, Change] = {
    "rows of one buffer": weights(lambda b: b[:64].view(8, 8), lambda b: b[64:128].view(8, 8)),
    "columns of one buffer": weights(lambda b: b.view(8, 32)[:, 0:16:2], lambda b: b.view(8, 32)[:, 1:16:2]),
    "transposed": weights(lambda b: b[:64].view(8, 8).t()),
    "gaps": weights(lambda b: b.view(16, 16)[::2, ::2]),
    "strides 3 and 22": weights(lambda b: b.as_strided((8, 8), (3, 22))),
    "shared between processes": lambda model: model.share_memory(),
    "without gradients": lambda model: model.requires_grad_(False),
    "an empty weight": with_an_empty_weight,
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("call", [sparsify_at_once, lambda model: feather_param.plan(model, final_rate=0.5)])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_a_weight_whose_zeros_could_not_be_exact_is_refused_at_the_door(kind, call):
    change, message = REFUSED[kind]
    change(model := linears())
    before, parameters = keys(model), [*model.parameters()]
    with pytest.raises(ValueError, match=message):
        call(model)
    assert keys(model) == before
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("kind", ["expanded", "strides 7 and 3", "memory of a dense weight", "inference tensor"])
def test_the_same_weight_may_stay_dense(kind):
    REFUSED[kind][0](model := linears())
    assert sparsify_at_once(model, exclude="0").report().zeros == 32


@pytest.mark.parametrize("kind", ["expanded", "overlapping rows", "inference tensor", "negative view", "sparse"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_the_copy_that_the_message_names_can_be_pruned(kind):
    change, message = REFUSED[kind]
    change(model := linears())
    weight = model[0].weight
    copies = {
        OWN_ELEMENTS: lambda: weight.detach().contiguous(),
        OWN_MEMORY: lambda: weight.detach().clone(),
        ORDINARY: lambda: weight.detach().to_dense().resolve_neg().clone(),
    }
    model[0].weight = nn.Parameter(copies[message]())
    assert sparsify_at_once(model).report().zeros == 64
    feather_param.desparsify(model)
    assert zeros_in(model) == 64


@pytest.mark.parametrize("kind", EXACT)
def test_each_call_is_as_exact_as_with_plain_weights(kind):
    results = []
    for copied in (False, True):
        EXACT[kind](model := linears())
        if copied:
            for layer in model:
                layer.weight = nn.Parameter(layer.weight.detach().clone(memory_format=torch.contiguous_format))
        pointers = [layer.weight.data_ptr() for layer in model]
        controller = sparsify_at_once(model)
        controller.step()
        results.append([controller.threshold, *model.state_dict().values(), *controller.masks().values()])
        results[-1] += [layer.weight for each in (model, copy.deepcopy(model).eval()) for layer in each]
        baked, of_state = feather_param.baked_state_dict(model), feather_param.baked_state_dict(model.state_dict())
        feather_param.desparsify(model)
        assert zeros_in(model) == 64
        assert same_state(model.state_dict(), baked)
        assert same_state(baked, of_state)
        assert [layer.weight.data_ptr() for layer in model] == pointers
        results[-1] += [*baked.values()]
    assert all_equal(*results)


def original(model: nn.Module, index: int) -> nn.Parameter:
    return model[index].parametrizations.weight.original


def replace_data(model: nn.Sequential) -> None:
    original(model, 0).data = numbers(8, 1).expand(8, 8)


def replace_data_by_overlapping(model: nn.Sequential) -> None:
    buffer = numbers(128)
    original(model, 0).data, original(model, 1).data = buffer[:64].view(8, 8), buffer[60:124].view(8, 8)


def load_expanded(model: nn.Sequential) -> None:
    state = model.state_dict()
    state["0.parametrizations.weight.original"] = numbers(8, 1).expand(8, 8)
    model.load_state_dict(state, assign=True)


def convert_in_inference_mode(model: nn.Sequential) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with torch.inference_mode():
            model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


LATER: dict[str, tuple[Change, str]] = {
    "expanded data": (replace_data, OWN_ELEMENTS),
    "overlapping data": (replace_data_by_overlapping, OWN_MEMORY),
    "expanded state": (load_expanded, OWN_ELEMENTS),
    "inference tensor": (
        convert_in_inference_mode,
        r"expected weights that can be written, got 0\.weight, made in torch\.inference_mode\(\); load",
    ),
}


@pytest.mark.parametrize("kind", LATER)
@pytest.mark.parametrize("call", ["desparsify", "freeze"])
def test_a_weight_that_becomes_such_after_sparsify_is_refused_before_anything_is_written(kind, call):
    change, message = LATER[kind]
    controller = sparsify_at_once(model := linears())
    change(model)
    controller.step()
    assert controller.report().zeros == 64
    baked = feather_param.baked_state_dict(model)
    assert sum(int((baked[f"{i}.weight"] == 0).sum()) for i in (0, 1)) == 64
    before, state = keys(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        getattr(controller, call)()
    assert keys(model) == before
    assert same_state(model.state_dict(), state)


@pytest.mark.parametrize("call", [lambda model, controller: controller.step(), lambda model, _: model.state_dict()])
def test_zeros_of_a_frozen_weight_that_becomes_such_are_not_restored(call):
    controller = sparsify_at_once(model := linears())
    controller.freeze()
    replace_data(model)
    step, before = controller.step_count, original(model, 0).clone()
    with pytest.raises(ValueError, match=OWN_ELEMENTS):
        call(model, controller)
    assert controller.step_count == step
    assert torch.equal(original(model, 0), before)


def test_a_mapped_file_is_never_written(tmp_path):
    torch.save(linears().state_dict(), path := tmp_path / "weights.pt")
    before = path.read_bytes()
    model = linears()
    model.load_state_dict(torch.load(path, mmap=True, weights_only=True), assign=True)
    controller = sparsify_at_once(model)
    controller.step()
    controller.freeze()
    feather_param.desparsify(model)
    assert zeros_in(model) == 64
    assert path.read_bytes() == before


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_only_a_bake_writes_to_the_memory_of_the_weights(tmp_path):
    np.save(tmp_path / "weight.npy", numbers(8, 8).numpy())
    model = linears()
    mapped = np.load(tmp_path / "weight.npy", mmap_mode="r")  # a write to it ends the process
    model[0].weight = nn.Parameter(torch.from_numpy(mapped))
    controller = sparsify_at_once(model)
    controller.step()
    assert controller.report().zeros == 64
    model.eval()(numbers(3, 8))
    copy.deepcopy(model)
    assert int((feather_param.baked_state_dict(model)["0.weight"] == 0).sum()) > 0

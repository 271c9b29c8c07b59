"""States that cannot be baked without their model, and the sentence that says why."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

import feather_param
from feather_param import patterns
from tests.core.models import Doubled, sparsify_at_once
from tests.core.saved_states import ENTRY, linear, require_same, tied, two_groups
from tests.network import net

ORIGINAL = "0.parametrizations.weight.original"


def state_of(model: nn.Module | None = None, **settings) -> dict[str, Tensor]:
    model = net() if model is None else model
    sparsify_at_once(model, **settings)
    return copy.deepcopy(model.state_dict())


class Rows(type(patterns.blocks(1, 2))):
    def __repr__(self) -> str:
        return f"rows({self.columns})"


def refuses(state: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        feather_param.baked_state_dict(state)


def test_a_plain_state_is_refused():
    refuses(net().state_dict(), "expected the state of a sparsified model, got a plain one: there is nothing to bake")


def test_a_state_without_the_entry_is_refused():
    state = state_of()
    del state[ENTRY]
    refuses(state, r"expected an entry \*\.shared\._extra_state beside 0\.parametrizations\.weight\.original, got none")
    refuses(torch_parametrizations.weight_norm(nn.Linear(4, 4)).state_dict(), "beside .*original0, got none")


def test_a_state_of_an_older_release_loads_and_is_refused():
    state = state_of()
    zeros = int(state[ENTRY][1])
    state[ENTRY] = torch.tensor([1, zeros, 7, -1])
    model = net(1)
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=9)
    model.load_state_dict(state)
    assert (controller.step_count, controller.report().zeros) == (7, zeros)
    refuses(state, r"got one of an older feather_param without; load the state into the model, sparsified as before")
    require_same(model)


def test_a_pattern_of_ones_own_is_refused_by_name():
    refuses(state_of(linear(), pattern=Rows(1, 2)), r"expected a pattern of feather_param.patterns, got rows\(2\), wh")


def test_parametrizations_of_other_libraries_are_refused_by_name():
    for add in (
        torch_parametrizations.weight_norm,
        lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
    ):
        model = net()
        add(model[3])
        refuses(state_of(model), r"no parametrization but ours, got another library's too at 3\.weight; load")


def test_a_part_of_a_state_is_refused():
    state = state_of()
    del state["3.parametrizations.weight.original"]
    refuses(state, rf"expected the 3 weights that {ENTRY} names, got a state without 3\.weight \(1 missing\)")
    model = net()
    sparsify_at_once(model)
    refuses(model[0].state_dict(), r"the 3 weights that .* names, got a state without 3\.weight \(2 missing\)")


def test_a_part_of_many_weights_is_refused_as_fast_as_all_are_baked():
    state = state_of(nn.Sequential(*[nn.Linear(2, 2) for _ in range(400)]))

    def seconds(function: Callable[[], object]) -> float:
        start = time.process_time()
        function()
        return time.process_time() - start

    whole = seconds(lambda: feather_param.baked_state_dict(state))
    del state["399.parametrizations.weight.original"]
    assert seconds(lambda: refuses(state, "without 399.weight")) < 1.5 * whole  # 4 if each prefix is tried to its end


def test_a_copy_of_a_part_of_the_model_beside_it_is_refused_or_named():
    model = nn.ModuleDict({"online": linear(), "head": linear(seed=1)})
    sparsify_at_once(model)
    beside = nn.ModuleDict({"model": model, "target": copy.deepcopy(model["online"])})
    refuses(beside.state_dict(), r"the 6 weights that target\.0.* names, got a state without head\.0.*a copy of a part")
    beside["target"] = copy.deepcopy(model["head"])  # it has no entry
    with pytest.warns(UserWarning, match=r"left as they are: target\.0\.parametrizations\.weight\.original, target\.2"):
        feather_param.baked_state_dict(beside.state_dict())


def test_tied_weights_that_differ_are_refused_and_one_of_them_suffices():
    model = tied()
    sparsify_at_once(model)
    state = copy.deepcopy(model.state_dict())
    expected = feather_param.baked_state_dict(model)
    one = feather_param.baked_state_dict(
        {key: value for key, value in state.items() if key != "b.parametrizations.weight.original"}
    )
    assert set(expected) - set(one) == {"b.weight"}
    assert torch.equal(one["a.weight"], expected["a.weight"])
    state["b.parametrizations.weight.original"] = state["a.parametrizations.weight.original"] + 1
    refuses(
        state, r"expected a\.parametrizations.* and b\.parametrizations.* to be equal, as the weights are tied, got two"
    )


def test_weights_that_are_not_finite_or_of_another_dtype_are_refused():
    state = state_of()
    refuses({**state, ORIGINAL: state[ORIGINAL] / 0.0}, r"NaN or infinity in 0\.weight")
    refuses({**state, ORIGINAL: state[ORIGINAL].to(torch.float8_e4m3fn)}, "float16, got torch.float8_e4m3fn at 0")
    refuses({**state, ORIGINAL: state[ORIGINAL].to("meta")}, "expected weights with values, got 0.* on the meta device")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda x: x.float(), "to be a row of integers, got torch.float32 of shape"),
        (lambda x: x[:3], r"to be a row of integers, got torch.int64 of shape \(3,\)"),
        (lambda x: x[:4], "to hold|damaged"),
        (lambda x: x[:-1], "damaged"),
        (lambda x: torch.cat([x[:6], x[7:]]), "damaged"),
        (lambda x: torch.cat([x[:6], x[6:] + 1000]), "damaged"),
        (
            lambda x: x.index_fill(0, torch.tensor(1), 10**6),
            "state of this model, which has 1,088 prunable weights, got",
        ),
        (lambda x: x.index_fill(0, torch.tensor(0), 3), "in version 2 or before, got 3"),
        (
            lambda x: x.index_fill(0, torch.tensor(x.numel() - 1), 2),
            "expected the allocation of this state to give 435",
        ),
        (lambda x: x.index_fill(0, torch.tensor(x.numel() - 1), -1), "expected a state with the zeros of each weight"),
    ],
)
def test_a_damaged_entry_is_refused(damage, message):
    state = state_of(linear(), rate=0.4, allocation=two_groups)
    refuses({**state, ENTRY: damage(state[ENTRY])}, message)


def test_no_damage_of_the_entry_raises_another_error():
    state = state_of(linear(), rate=0.4, allocation=two_groups)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        broken = state[ENTRY].clone()
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            at = int(torch.randint(len(broken), (), generator=generator))
            broken[at] = int(torch.randint(-3, 200, (), generator=generator))
        with contextlib.suppress(ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            feather_param.baked_state_dict({**state, ENTRY: broken})


def with_text(state: dict[str, Tensor], text: str) -> dict[str, Tensor]:
    """Return a state whose entry holds another text."""
    entry, data = state[ENTRY], text.encode()
    return {**state, ENTRY: torch.cat([entry[:5], torch.tensor([len(data), *data])])}


def settings_in(state: dict[str, Tensor]) -> dict[str, Any]:
    return json.loads(bytes(state[ENTRY][6 : 6 + int(state[ENTRY][5])].tolist()))


@pytest.mark.parametrize(
    "name", ["group_each", "per_layer", "in_proportion", "from_plan", "Group", "Allocation", "best"]
)
def test_a_name_that_is_no_allocation_is_refused(name):
    state = state_of()
    text = json.dumps({**settings_in(state), "allocation": name})
    refuses(with_text(state, text), f"expected an allocation of this feather_param, got {name}; bake with the release")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**5,
        '{"p":' * 10**5,
        "[]",
        "null",
        '{"p": ' + "9" * 5000 + "}",
        *({"p": 10**400}, {"p": math.nan}, {"p": 0}, {"max_rate": 2}, {"min_nonzero": math.inf}, {"min_nonzero": -1}),
        *({"weights": []}, {"weights": {}}, {"weights": {"0.weight": 1}}, {"stacked": 1}),
    ],
    ids=lambda text: str(text)[:20],
)
def test_a_damaged_text_is_refused(text):
    state = state_of()
    text = text if isinstance(text, str) else json.dumps({**settings_in(state), **text})
    refuses(with_text(state, text), f"expected {ENTRY} as feather_param saves it, got a damaged one")

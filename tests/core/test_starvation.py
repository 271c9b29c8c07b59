"""The warning for layers that starve: when it comes, what it says, and how often the survivors are counted."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import feather_param
from feather_param import allocations
from feather_param.core import starvation
from feather_param.core.config import Config
from feather_param.core.shared import SharedSparsity
from tests import twins
from tests.core.models import image_loss, sparsify_at_once
from tests.layer_cases import TiedHead
from tests.network import net
from tests.training import train

STARVES = "fewer survivors than outputs"


@pytest.fixture(autouse=True)
def _show_the_warning():
    warnings.filterwarnings("error", STARVES)  # pyproject.toml ignores it; pytest restores the filters after each test


@torch.no_grad()
def keep_only(weight: Tensor, survivors: int) -> None:
    """Make all elements small, so that they are pruned first, except for some."""
    weight.mul_(1e-3)
    weight.view(-1)[:survivors] = 10.0


def starving_net(survivors: int = 2) -> nn.Sequential:
    """Return a network whose layer 4, with 64 elements and 4 outputs, will keep a few elements."""
    model = net().requires_grad_(False)  # without training, the survivors follow from the schedule
    keep_only(model[4].weight, survivors)
    return model


def warnings_of_steps(controller: feather_param.Controller, steps: int) -> list[tuple[int, str]]:
    """Make steps. Return the messages of their warnings, with the step."""
    found: list[tuple[int, str]] = []
    for _ in range(steps):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            controller.step()
        found += [(controller.step_count, str(each.message)) for each in caught]
    return found


@pytest.fixture
def counts(monkeypatch) -> list[int]:
    """The steps at which the survivors of any model were counted."""
    found: list[int] = []
    original = SharedSparsity.survivors

    def survivors(self):
        found.append(self.position.step)
        return original(self)

    monkeypatch.setattr(SharedSparsity, "survivors", survivors)
    return found


# -- when -------------------------------------------------------------------------------------------------------------


def test_a_starving_layer_is_named_once_and_before_the_final_rate():
    controller = feather_param.sparsify(starving_net(), final_rate=0.9, total_steps=200)
    [(step, message)] = warnings_of_steps(controller, 200)
    assert step < 30
    assert controller.rate == 0.9
    assert message == (
        "fewer survivors than outputs in 4.weight (2 survivors for 4 outputs): some of their outputs have no input, "
        "the layers starve; what helps, the best first: p=1, allocation=allocations.lamp, min_nonzero_per_layer, "
        "a lower final_rate or learning rate"
    )
    assert controller.report().starving == ("4.weight",)  # and does not warn again


def test_the_warning_points_at_the_line_of_the_user():
    controller = feather_param.sparsify(starving_net(), final_rate=0.9, total_steps=4, end_step=2)
    with pytest.warns(UserWarning, match=STARVES) as caught:
        controller.step()
    assert caught[0].filename == __file__


@pytest.mark.parametrize("survivors", [4, 5])
def test_as_many_survivors_as_outputs_are_enough(survivors):
    controller = feather_param.sparsify(starving_net(survivors), final_rate=0.9, total_steps=40)
    assert warnings_of_steps(controller, 40) == []
    assert controller.report().starving == ()


def test_a_healthy_training_gives_no_warning(counts):
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.8, total_steps=60)
    train(model, image_loss, controller, range(60))
    assert counts
    assert controller.report().starving == ()


def test_nothing_is_counted_before_half_of_the_final_zeros(counts):
    controller = feather_param.sparsify(net().requires_grad_(False), final_rate=0.8, total_steps=100)
    while controller.rate < 0.4:
        assert not counts
        controller.step()
    assert counts == [controller.step_count]


def test_a_report_names_the_layers_that_no_step_has_named():
    controller = sparsify_at_once(starving_net(), 0.9)
    with pytest.warns(UserWarning, match=STARVES):
        controller.report()
    controller.report()
    assert warnings_of_steps(controller, 2) == []


def test_a_layer_that_starves_and_then_loses_all_survivors_is_named_twice():
    model = starving_net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=100)
    [(_, first)] = warnings_of_steps(controller, 30)
    model[4].parametrizations.weight.original.mul_(1e-6)
    [(_, second)] = warnings_of_steps(controller, 70)
    assert first.startswith(STARVES)
    assert second.startswith("nothing survives in 4.weight:")


def test_a_layer_that_starves_at_a_constant_rate_is_named():
    model = net().requires_grad_(False)
    controller = feather_param.sparsify(model, final_rate=0.8, total_steps=100)
    assert warnings_of_steps(controller, 60) == []
    keep_only(model[4].parametrizations.weight.original, 2)
    [(step, message)] = warnings_of_steps(controller, 40)
    assert step <= 70
    assert message.startswith(STARVES)


# -- what it says -----------------------------------------------------------------------------------------------------


def test_a_warning_names_five_layers_and_only_the_first_one_gives_advice():
    layers = nn.Sequential(*[nn.Linear(64, 64) for _ in range(10)]).requires_grad_(False)
    for i in range(7):
        keep_only(layers[i].weight, i + 1)
    controller = feather_param.sparsify(layers, final_rate=0.8, total_steps=100)
    [(_, message)] = warnings_of_steps(controller, 60)
    assert "in 0.weight (1 survivor for 64 outputs), 1.weight (2 survivors" in message
    assert "4.weight (5 survivors for 64 outputs) and 2 more: some" in message
    keep_only(layers[7].parametrizations.weight.original, 20)
    [(_, message)] = warnings_of_steps(controller, 40)
    assert message == f"{STARVES} in 7.weight (20 survivors for 64 outputs): some of their outputs have no input, " + (
        "the layers starve"
    )


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "first: p=1, allocation=allocations.lamp, min_nonzero_per_layer, a lower final_rate"),
        ({"p": 1.0}, "first: allocation=allocations.lamp, min_nonzero_per_layer, a lower"),
        ({"allocation": allocations.erk}, "first: p=1, min_nonzero_per_layer, a lower"),
        ({"p": 0.5, "allocation": allocations.lamp, "min_nonzero_per_layer": 3}, "first: a lower final_rate"),
    ],
)
def test_the_advice_names_what_is_not_in_use(settings, advice):
    config = Config(final_rate=0.99, **settings)
    survivors, outputs = {"fc.weight": 12, "conv.weight": 300}, {"fc.weight": 100, "conv.weight": 64}
    with pytest.warns(UserWarning, match=STARVES) as caught:
        starvation.Starvation().warn(survivors, outputs, config)
    assert advice in str(caught[0].message)


def test_the_warning_says_if_there_are_fewer_survivors_than_outputs_in_all():
    with pytest.warns(UserWarning, match="all layers have 22 survivors for 164 outputs, so lower final_rate"):
        starvation.Starvation().warn({"fc": 12, "conv": 10}, {"fc": 100, "conv": 64}, Config(final_rate=0.99))


# -- copies, loads and frozen models ----------------------------------------------------------------------------------


def test_copies_do_not_warn_again():
    model = starving_net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=100)
    assert len(warnings_of_steps(controller, 40)) == 1
    _, twin = copy.deepcopy((model, controller))
    assert warnings_of_steps(twin, 60) == []
    twin.report()
    pickle.loads(pickle.dumps(controller._starvation)).warn({"4.weight": 2}, {"4.weight": 4}, Config(final_rate=0.9))


def test_a_warning_of_a_copy_does_not_silence_the_original():
    model = starving_net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=100)
    _, twin = copy.deepcopy((model, controller))
    assert len(warnings_of_steps(twin, 40)) == 1
    assert len(warnings_of_steps(controller, 40)) == 1


def test_a_controller_that_goes_back_counts_again(counts):
    controller = feather_param.sparsify(net().requires_grad_(False), final_rate=0.8, total_steps=100)
    start = controller.state_dict()
    warnings_of_steps(controller, 50)
    first, counts[:] = [*counts], []
    controller.load_state_dict(start)
    warnings_of_steps(controller, 50)
    assert counts == first


def test_frozen_models_are_not_counted(counts):
    controller = feather_param.sparsify(net().requires_grad_(False), final_rate=0.8, total_steps=100)
    warnings_of_steps(controller, 30)
    controller.freeze()
    assert counts.pop()
    counts.clear()
    assert warnings_of_steps(controller, 70) == []
    assert counts == []


def test_sharded_weights_are_counted_by_the_report_only(counts, monkeypatch):
    controller = feather_param.sparsify(starving_net(), final_rate=0.9, total_steps=40)
    with monkeypatch.context() as patch:
        patch.setattr(SharedSparsity, "sharded", True)
        assert warnings_of_steps(controller, 40) == []
    assert counts == []
    with pytest.warns(UserWarning, match=STARVES):
        controller.report()


# -- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "end", "most"), [(4, 2, 4), (20, 10, 14), (100, 50, 14), (800, 400, 14), (3000, 2000, 26), (800, 0, 11)]
)
def test_the_survivors_are_counted_a_few_times_in_a_training(total, end, most, counts):
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)).requires_grad_(False)
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=total, end_step=end)
    warnings_of_steps(controller, total)
    assert len(counts) <= most
    assert not end or end in counts
    before = [step for step in counts if step < end]
    assert all(later - step >= min(end / 10, 100) for step, later in itertools.pairwise(before))


def test_counts_that_are_late_are_read_at_a_later_step(monkeypatch):
    arrived = False
    monkeypatch.setattr(starvation._Counted, "arrived", property(lambda self: arrived))  # as on a GPU
    controller = feather_param.sparsify(starving_net(), final_rate=0.9, total_steps=40, end_step=2)
    assert warnings_of_steps(controller, 3) == []
    arrived = True
    [(step, message)] = warnings_of_steps(controller, 1)
    assert step == 4
    assert message.startswith(STARVES)


# -- outputs ----------------------------------------------------------------------------------------------------------

# A layer of six outputs, its input, and the dimension of its outputs in the result.
LAYERS = {
    "Linear": (lambda: nn.Linear(24, 6), torch.ones(1, 24), 1),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 5), torch.ones(1, 4, 7), 1),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), torch.ones(1, 4, 5, 5), 1),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), torch.ones(1, 6, 5, 5), 1),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), torch.ones(1, 4, 5, 5), 1),
    "grouped transposed": (lambda: nn.ConvTranspose2d(8, 6, 3, groups=2), torch.ones(1, 8, 5, 5), 1),
    "depthwise transposed": (lambda: nn.ConvTranspose1d(6, 6, 5, groups=6), torch.ones(1, 6, 5), 1),
    "Embedding": (lambda: nn.Embedding(20, 6), torch.arange(20), 1),
}


@pytest.mark.parametrize(("layer", "x", "dim"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("rate", [0.5, 0.9, 0.97])
def test_a_layer_starves_if_its_survivors_cannot_reach_all_outputs(layer, x, dim, rate):
    for seed in range(5):
        torch.manual_seed(seed)
        model = layer()
        controller = sparsify_at_once(model, rate, include="weight")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", STARVES)
            [row] = (report := controller.report()).rows
        inputs = twins.survivors_of_outputs(layer(), x, dim, model.weight.detach())
        assert row.outputs == len(inputs) == 6
        assert row.survivors == sum(inputs)
        assert row.survivors_per_output == sum(inputs) / 6
        assert bool(report.starving) == (sum(inputs) < 6)
        if report.starving:
            assert 0 in inputs


def test_a_tied_weight_has_the_outputs_of_its_largest_place():
    controller = sparsify_at_once(TiedHead(), 0.5, include=["embedding.weight", "head.weight", "body"])
    assert {row.name: row.outputs for row in controller.report().rows} == {"embedding.weight": 20, "body.weight": 16}


def test_the_projections_of_attention_count_their_outputs_together():
    controller = sparsify_at_once(nn.MultiheadAttention(16, 4), 0.5)
    outputs = {row.name: row.outputs for row in controller.report().rows}
    assert outputs == {"in_proj_weight": 48, "out_proj.weight": 16}

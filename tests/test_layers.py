"""Each kind of layer is trained, reported and baked, with each feature; layers that cannot be pruned are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import feather_param
from feather_param import schedules
from tests.layer_cases import CASES, TiedHead, UsedTwice
from tests.training import all_equal, dense_weights, keys, pruned_places, train, zeros_after_baking

RATE = 0.8


@pytest.mark.filterwarnings("ignore:nothing survives", "ignore:sparsify prunes only")
@pytest.mark.parametrize("rate", [0.5, 0.95])
@pytest.mark.parametrize(("make", "include"), CASES.values(), ids=CASES)
def test_report_bake_and_copy_have_the_exact_number_of_zeros_after_training(make, include, rate):
    torch.manual_seed(0)
    model = make()
    before = keys(model)
    controller = feather_param.sparsify(model, final_rate=rate, total_steps=5, include=include)
    dense = [weight.clone() for weight in dense_weights(model)]
    x = torch.randn(3, 4, 16)
    train(model, lambda model, step: model(x).square().mean(), controller)
    total = sum(weight.numel() for weight in dense)
    for old, new in zip(dense, dense_weights(model), strict=True):
        assert not torch.equal(old, new), "this weight was not trained"
    report = controller.report()
    assert (report.zeros, report.total) == (round(rate * total), total)
    x = torch.randn(3, 4, 16)
    out = model.eval()(x).detach()
    copied = copy.deepcopy(model)
    assert zeros_after_baking(model) == (round(rate * total), total)
    assert keys(model) == before
    # Rounding errors: the weight norm is inverted and applied again. The layers behind it amplify them little.
    torch.testing.assert_close(model(x).detach(), out, rtol=1e-4, atol=1e-5)
    assert zeros_after_baking(copied) == (round(rate * total), total)


def sparsified(make, include, **arguments) -> tuple[nn.Module, feather_param.Controller]:
    model = make()
    arguments = {"final_rate": RATE, "total_steps": 4, "include": include, **arguments}
    return model, feather_param.sparsify(model, **arguments)


def loss(model: nn.Module, step: int) -> Tensor:
    """Return a loss on random inputs, which depend on the step only."""
    x = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(step))
    return model(x.to(next(model.parameters()).dtype)).float().square().mean()


def bake_and_count(model: nn.Module) -> None:
    """Desparsify and check that the number of zeros is exact."""
    zeros, total = zeros_after_baking(model)
    assert zeros == round(RATE * total)


def moving_average(make, include) -> None:
    model, controller = sparsified(make, include)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for step in range(4):
        train(model, loss, controller, [step])
        average.update_parameters(model)
    average.eval()
    loss(average, 9)
    bake_and_count(average.module)
    bake_and_count(model)


def dense_checkpoint(make, include) -> None:
    torch.manual_seed(7)
    pretrained = make()
    model, controller = sparsified(make, include, schedule=schedules.constant)
    model.load_state_dict(pretrained.state_dict())
    reference, other = sparsified(lambda: copy.deepcopy(pretrained), include, schedule=schedules.constant)
    assert torch.equal(controller.threshold, other.threshold)
    assert torch.equal(loss(model.eval(), 0), loss(reference.eval(), 0))
    bake_and_count(model)


def resuming(make, include) -> None:
    runs = []
    for stop in (4, 2):
        model, controller = sparsified(make, include)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        torch.manual_seed(1)
        train(model, loss, controller, range(stop), optimizer)
        runs.append((model, optimizer, controller))
    complete, interrupted = runs
    torch.manual_seed(9)
    model, controller = sparsified(make, include)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for new, saved in zip((model, optimizer, controller), interrupted, strict=True):
        new.load_state_dict(copy.deepcopy(saved.state_dict()))  # an optimizer would use the tensors of the other one
    train(model.eval(), loss, controller, range(2, 4), optimizer)
    train(interrupted[0].eval(), loss, interrupted[2], range(2, 4), interrupted[1])
    assert all_equal(model.parameters(), interrupted[0].parameters())
    assert controller.state_dict() == complete[2].state_dict()
    bake_and_count(model)


def freezing(make, include) -> None:
    model, controller = sparsified(make, include, schedule=schedules.constant)
    controller.freeze()
    zeros = [place.value() == 0 for place in pruned_places(model)]
    train(model, loss, controller, range(3))
    after = [place.value() == 0 for place in pruned_places(model)]
    assert all_equal(zeros, after)
    bake_and_count(model)


def guards(make, include) -> None:
    model, controller = sparsified(make, include, min_nonzero_per_layer=5, max_rate_per_layer=0.9)
    train(model, loss, controller, range(4))
    assert all(row.total - row.zeros >= 5 and row.rate <= 0.9 for row in controller.report().rows)
    bake_and_count(model)


def bfloat16(make, include) -> None:
    model, controller = sparsified(lambda: make().to(torch.bfloat16), include)
    train(model, loss, controller, range(4))
    bake_and_count(model)


def autocast(make, include) -> None:
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss(make(), 0)
    except RuntimeError as error:
        pytest.skip(f"torch does not support this layer under autocast: {error}")
    model, controller = sparsified(make, include)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(model, loss, controller, range(4))
    bake_and_count(model)


def following(make, include) -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    controller = feather_param.sparsify(model, final_rate=RATE, total_steps=4, include=include, optimizer=optimizer)
    for step in range(4):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    assert controller.step_count == 4
    bake_and_count(model)


FEATURES = [
    moving_average,
    dense_checkpoint,
    resuming,
    freezing,
    guards,
    bfloat16,
    autocast,
    following,
]


@pytest.mark.filterwarnings("ignore:nothing survives", "ignore:sparsify prunes only")
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.__name__)
@pytest.mark.parametrize(("make", "include"), CASES.values(), ids=CASES)
def test_each_feature_works_with_each_layer(make, include, feature):
    torch.manual_seed(0)
    feature(make, include)


def test_a_head_that_is_tied_to_an_embedding_is_reported_as_dense():
    model = TiedHead()
    with pytest.warns(UserWarning, match="prunes only 256 of the 576 elements"):
        controller = feather_param.sparsify(model, final_rate=0.9, total_steps=5)
    assert controller.report().skipped == {
        "embedding.weight": "a weight of Embedding: name it in include to prune it",
        "head.weight": "tied to embedding.weight, which is not selected",
    }


@pytest.mark.parametrize(
    ("option", "message"),
    [({"sparse": True}, "sparse=True at 0.weight"), ({"max_norm": 1.0}, "max_norm=1.0 at 0.weight")],
)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_that_writes_past_the_parametrization_is_refused(kind, option, message):
    model = nn.Sequential(kind(4, 8, **option))
    with pytest.raises(ValueError, match=f"expected an embedding without .*, got {message}: it writes .*exclude="):
        feather_param.sparsify(model, final_rate=0.5, total_steps=1, include="0.weight")
    assert list(model.state_dict()) == ["0.weight"]


@pytest.mark.parametrize("norm", [torch_parametrizations.spectral_norm, torch_parametrizations.orthogonal])
def test_a_norm_that_cannot_hold_zeros_is_refused_by_sparsify(norm):
    model = nn.Sequential(nn.Linear(16, 16), norm(nn.Linear(16, 16)))
    before = keys(model)
    with pytest.raises(ValueError, match=r"parametrizations of 1.weight to .*, got _\w+; .*exclude='1.weight'"):
        feather_param.sparsify(model, final_rate=0.5, total_steps=1)
    assert keys(model) == before
    feather_param.sparsify(model, final_rate=0.5, total_steps=1, exclude="1.weight")


def test_a_parametrization_without_an_inverse_is_refused_by_sparsify():
    class Masked(nn.Module):  # as torch.ao.pruning registers it
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * torch.ones_like(weight)

    model = nn.Sequential(nn.Linear(16, 16))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Masked())
    before = keys(model)
    with pytest.raises(
        ValueError, match=r"parametrizations of 0.weight to .*, got Masked; remove them before sparsify"
    ):
        feather_param.sparsify(model, final_rate=0.5, total_steps=1)
    assert keys(model) == before


def test_the_baked_state_dict_has_a_layer_under_both_of_its_names():
    model = UsedTwice()
    feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0)
    state = feather_param.baked_state_dict(model)
    feather_param.desparsify(model)
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_an_lstm_can_be_copied_after_a_forward_pass_that_failed():
    model = nn.LSTM(4, 4)
    feather_param.sparsify(model, final_rate=0.5, total_steps=2, include="weight_*")
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 1, 5))
    copy.deepcopy(model)

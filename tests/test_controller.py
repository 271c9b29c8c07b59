"""The controller: the schedule, theta, optimizers that it follows, reports, and steps that fail."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import feather_param
from feather_param import schedules
from tests import twins
from tests.network import net, train_step

SPANS = [(10, 0, None), (10, 2, 8), (10, 3, 3), (10, 0, 0), (10, 10, 10), (1, 0, None), (7, 1, 3)]


# -- schedule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "start", "end"), SPANS)
@pytest.mark.parametrize("final_rate", [0.3, 0.9])
def test_rate_threshold_and_zeros_follow_the_schedule(total, start, end, final_rate):
    model = net()
    controller = feather_param.sparsify(model, final_rate=final_rate, total_steps=total, start_step=start, end_step=end)
    layers = [model[0], model[3], model[4]]
    for step in range(total + 3):
        rate = twins.rate(step, final_rate, start, total // 2 if end is None else end)
        dense = [layer.parametrizations.weight.original for layer in layers]
        k = round(rate * sum(weight.numel() for weight in dense))
        assert controller.step_count == step
        assert controller.rate == rate
        assert float(controller.threshold) == twins.threshold(dense, k)
        assert twins.count_zeros(layer.weight for layer in layers) == k
        with torch.no_grad():
            for weight in dense:
                weight.add_(torch.randn_like(weight), alpha=0.1)
        controller.step()


def test_any_function_of_the_progress_is_a_schedule():
    controller = feather_param.sparsify(
        net(), final_rate=0.8, total_steps=4, end_step=4, schedule=lambda progress: progress**2
    )
    controller.step()
    assert controller.rate == 0.8 / 16


def test_a_threshold_that_was_returned_does_not_change_later():
    controller = feather_param.sparsify(net(), final_rate=0.9, total_steps=8)
    returned = []
    for _ in range(4):
        controller.step()
        returned.append(controller.threshold)
    assert [float(t) for t in returned] == sorted({float(t) for t in returned})


def test_a_controller_names_its_model():
    model = nn.Linear(4, 4)
    assert feather_param.sparsify(model, final_rate=0.5, total_steps=1).model is model


def test_the_repr_shows_rate_step_and_weights():
    controller = feather_param.sparsify(net(), final_rate=0.9, total_steps=4)
    controller.step()
    assert repr(controller) == "Controller(rate=0.7875 of 0.9, step 1 of 4, 2,328 weights)"
    controller.freeze()
    assert repr(controller) == "Controller(rate=0.7875 of 0.9, step 1 of 4, 2,328 weights, frozen)"


# -- theta ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("final_rate", "theta"), [(0.9, 1.0), (0.95, 1.0), (0.951, 0.5), (0.99, 0.5)])
def test_the_default_of_theta_is_that_of_the_paper(final_rate, theta):
    model = net()
    feather_param.sparsify(model, final_rate=final_rate, total_steps=4)
    assert model[0].parametrizations.weight[0].shared.config.theta == theta


def test_theta_may_be_a_function_of_the_rate():
    def theta(rate):
        return 2.0 - 2.0 * rate

    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=8, theta=theta)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(8):
        for layer in (model[0], model[3], model[4]):
            original = layer.parametrizations.weight.original
            upstream = torch.randn_like(original)
            (grad,) = torch.autograd.grad(layer.weight, original, upstream)
            slope = twins.slope(original, float(controller.threshold), theta(controller.rate)).float()
            assert torch.equal(grad, upstream * slope)
        train_step(model, optimizer, step)
        controller.step()
    assert controller.rate == 0.9


def test_a_theta_of_the_rate_is_copied_and_moved_with_the_model_and_not_saved():
    model = net()
    feather_param.sparsify(model, final_rate=0.9, total_steps=1, end_step=0, theta=lambda rate: rate)
    keys = list(model.state_dict())
    for moved in (copy.deepcopy(model).double(), copy.deepcopy(model).to("meta").to_empty(device="cpu")):
        shared = moved[0].parametrizations.weight[0].shared
        assert (shared.theta, shared.theta.dtype) == (torch.tensor(0.9), torch.float32)
        assert list(moved.state_dict()) == keys
    other = net()
    feather_param.sparsify(other, final_rate=0.9, total_steps=1, end_step=0)
    assert list(other.state_dict()) == keys


# -- optimizers that advance the controller ---------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False], ids=["optimizer first", "sparsify first"])
def test_following_an_optimizer_does_the_same_as_calling_step(before):
    by_hand, followed = net(), net()
    if before:
        optimizer = torch.optim.SGD(followed.parameters(), lr=0.1, momentum=0.9)
    else:
        feather_param.sparsify(followed, final_rate=0.9, total_steps=6)
        with pytest.warns(UserWarning, match="call controller.step"):  # no step was made, so the weights do not change
            feather_param.desparsify(followed)
        optimizer = torch.optim.SGD(followed.parameters(), lr=0.1, momentum=0.9)
    other = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    follower = feather_param.sparsify(followed, final_rate=0.9, total_steps=6, optimizer=optimizer)
    controller = feather_param.sparsify(by_hand, final_rate=0.9, total_steps=6)
    for step in range(6):
        train_step(followed, optimizer, step)
        train_step(by_hand, other, step)
        controller.step()
        assert follower.step_count == step + 1
        assert torch.equal(follower.threshold, controller.threshold)
    with pytest.raises(RuntimeError, match=r"expected step\(\) not to be called: sparsify got optimizer="):
        follower.step()
    assert follower.step_count == 6


def test_a_second_sparsify_replaces_the_controller_of_the_optimizer():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = feather_param.sparsify(model, final_rate=0.5, total_steps=4, end_step=0, optimizer=optimizer)
    feather_param.desparsify(model)
    second = feather_param.sparsify(model, final_rate=0.9, total_steps=4, optimizer=optimizer)
    train_step(model, optimizer, 0)
    assert (first.step_count, second.step_count) == (0, 1)
    with pytest.raises(RuntimeError, match="expected report"):
        first.report()
    with pytest.raises(RuntimeError, match="expected desparsify"):
        first.desparsify()


def test_desparsify_keeps_other_hooks_of_the_optimizer():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    feather_param.sparsify(model, final_rate=0.5, total_steps=4, end_step=0, optimizer=optimizer)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    feather_param.desparsify(model)
    with pytest.warns(UserWarning, match="stepped a model that was desparsified"):
        train_step(model, optimizer, 0)
    train_step(model, optimizer, 1)
    assert calls == [1, 1]


def test_an_optimizer_that_does_not_train_all_weights_causes_a_warning():
    model = net()
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"does not train 0.weight, 3.weight, and they will be pruned"):
        feather_param.sparsify(model, final_rate=0.5, total_steps=4, optimizer=optimizer)


# -- reports and warnings ---------------------------------------------------------------------------------------------


@given(
    rate=st.floats(0.01, 0.99),
    values=st.lists(st.sampled_from([0.0, 0.5, -0.5, 1.0, 2.0]) | st.floats(-4, 4, width=16), min_size=8, max_size=8),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(max_examples=200)
def test_the_report_counts_the_zeros_that_desparsify_writes(rate, values, dtype):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(values[:4]).view(2, 2))
        model[1].weight.copy_(torch.tensor(values[4:]).view(2, 2))
    k = round(rate * 8)
    if not 0 < k < 8:
        return
    controller = feather_param.sparsify(model, final_rate=rate, total_steps=1, schedule=schedules.constant)
    dense = [layer.parametrizations.weight.original for layer in model]
    expected = twins.zeros(dense, k)
    t = controller.threshold.item()
    survivors = [int((weight.abs() > t).sum()) for weight in dense]
    if 0 in survivors:  # the elements that are kept in a layer, if any, equal the threshold
        with pytest.warns(UserWarning, match="nothing survives in"):
            report = controller.report()
        with pytest.warns(UserWarning, match="nothing survives in"):
            controller.desparsify()
    else:
        report = controller.report()
        controller.desparsify()
    zeros = [(layer.weight == 0).flatten().tolist() for layer in model]
    assert zeros[0] + zeros[1] == expected
    assert [row.zeros for row in report.rows] == [sum(zeros[0]), sum(zeros[1])]
    assert (report.total, report.zeros) == (8, sum(expected))
    assert report.rate == sum(expected) / 8
    assert [row.survivors for row in report.rows] == survivors
    assert report.starving == tuple(row.name for row in report.rows if row.survivors < 2)
    if any(survivors):
        assert sum(row.survivor_fraction for row in report.rows) == pytest.approx(1.0)


def test_a_report_prints_an_aligned_table_and_the_dense_weights():
    controller = feather_param.sparsify(net(), final_rate=0.5, total_steps=1, exclude="4", end_step=0)
    lines = str(controller.report()).splitlines()
    assert lines[0].split() == ["weight", "shape", "total", "zeros", "rate", "of", "all", "survivors", "per", "output"]
    assert lines[1].split()[:3] == ["0.weight", "8x3x3x3", "216"]
    assert lines[-2].split() == ["all", "2,264", "1,132", "50.000%", "100.00%", "47.2"]  # 1,132 survivors, 24 outputs
    assert lines[-1] == "dense: 4.weight (excluded)"
    assert len({len(line) for line in lines[:-1]}) == 1


def test_a_layer_with_no_survivors_is_named_once_in_training_and_at_desparsify():
    model = net()
    with torch.no_grad():
        model[4].weight.mul_(1e-6)
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=4, end_step=2)
    with pytest.warns(
        UserWarning, match=r"nothing survives in 4\.weight: .*what helps, the best first: p=1, .*exclude"
    ) as caught:
        controller.step()
    controller.step()
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="nothing survives in 4") as caught:
        feather_param.desparsify(model)
    assert caught[0].filename == __file__


def test_a_freeze_before_any_zeros_causes_a_warning():
    controller = feather_param.sparsify(net(), final_rate=0.9, total_steps=4)
    with pytest.warns(
        UserWarning, match=r"freeze\(\) after the 2,095 zeros of final_rate are reached, got it at 0: call"
    ):
        controller.freeze()


# -- steps that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_with_a_weight_that_is_not_finite_is_refused_and_not_counted(value):
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=4)
    controller.step()
    before = controller.state_dict()
    with torch.no_grad():
        model[3].parametrizations.weight.original[0, 0] = value
    with pytest.raises(ValueError, match=r"finite weights, got NaN or infinity in 3\.weight; .*last checkpoint"):
        controller.step()
    assert controller.state_dict() == before
    with pytest.raises(ValueError, match="finite weights"):
        feather_param.desparsify(model)
    assert hasattr(model[3], "parametrizations")


def test_a_schedule_that_raises_leaves_the_step_uncounted():
    failing = []

    def schedule(progress):
        if failing:
            raise KeyError("lost")
        return progress

    controller = feather_param.sparsify(net(), final_rate=0.9, total_steps=8, schedule=schedule)
    controller.step()
    state = controller.state_dict()
    failing.append(True)
    for call in (controller.step, lambda: controller.load_state_dict(state)):
        with pytest.raises(KeyError, match="lost"):
            call()
        assert controller.step_count == 1


def test_a_step_or_a_load_that_fails_changes_neither_threshold_nor_theta():
    failing = []

    def theta(rate):
        return -1.0 if failing else 1.0 - rate

    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=8, theta=theta)
    start = controller.state_dict()
    controller.step()
    shared = model[0].parametrizations.weight[0].shared
    threshold = model[0].parametrizations.weight[0].threshold
    before = (controller.state_dict(), threshold.clone(), shared.position.zeros, shared.theta.clone())

    def check(call, match):
        with pytest.raises(ValueError, match=match):
            call()
        assert (controller.state_dict(), threshold, shared.position.zeros, shared.theta) == before

    failing.append(True)
    for call in (controller.step, lambda: controller.load_state_dict(start)):
        check(call, "expected theta to return")
    failing.clear()
    with torch.no_grad():
        model[3].parametrizations.weight.original[0, 0] = float("nan")
    for call in (controller.step, lambda: controller.load_state_dict(start)):
        check(call, "expected finite weights")

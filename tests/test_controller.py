"""The controller: schedule in steps, following an optimizer, resuming, reporting."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import feather_param
from feather_param import schedules
from tests import twins

ARGS = {"final_rate": 0.9, "total_steps": 4}


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 16), nn.Linear(16, 4))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 6, 6, generator=generator), torch.randint(4, (8,), generator=generator)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    x, y = batch(step)
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


SPANS = [(10, 0, None), (10, 2, 8), (10, 3, 3), (10, 0, 0), (10, 10, 10), (1, 0, None), (7, 1, 3)]


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


def test_any_callable_is_a_schedule():
    controller = feather_param.sparsify(
        net(), final_rate=0.8, total_steps=4, end_step=4, schedule=lambda progress: progress**2
    )
    controller.step()
    assert controller.rate == 0.8 / 16


@pytest.mark.parametrize(("final_rate", "theta"), [(0.9, 1.0), (0.95, 1.0), (0.951, 0.5), (0.99, 0.5)])
def test_default_theta_is_the_papers_rule(final_rate, theta):
    model = net()
    feather_param.sparsify(model, final_rate=final_rate, total_steps=4)
    assert model[0].parametrizations.weight[0].shared.config.theta == theta


def test_theta_may_follow_the_rate():
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


def test_theta_of_the_rate_moves_and_copies_with_the_model():
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


def test_resume_with_theta_of_the_rate():
    def build():
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return (
            model,
            optimizer,
            feather_param.sparsify(
                model, final_rate=0.9, total_steps=8, theta=lambda rate: 1.0 - rate, optimizer=optimizer
            ),
        )

    parts, resumed = build(), build()
    for step in range(3):
        train_step(*parts[:2], step)
    for part, twin in zip(parts, resumed, strict=True):
        twin.load_state_dict(copy.deepcopy(part.state_dict()))
    for step in range(3, 8):
        assert train_step(*parts[:2], step) == train_step(*resumed[:2], step)


@pytest.mark.parametrize("before", [True, False], ids=["optimizer first", "sparsify first"])
def test_the_hook_counts_the_steps(before):
    by_hand, hooked = net(), net()
    if before:
        optimizer = torch.optim.SGD(hooked.parameters(), lr=0.1, momentum=0.9)
    else:
        feather_param.sparsify(hooked, final_rate=0.9, total_steps=6)
        with pytest.warns(UserWarning, match="call controller.step"):  # of what is left as it was, zeros and all
            feather_param.desparsify(hooked)
        optimizer = torch.optim.SGD(hooked.parameters(), lr=0.1, momentum=0.9)
    other = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    follower = feather_param.sparsify(hooked, final_rate=0.9, total_steps=6, optimizer=optimizer)
    controller = feather_param.sparsify(by_hand, final_rate=0.9, total_steps=6)
    for step in range(6):
        train_step(hooked, optimizer, step)
        train_step(by_hand, other, step)
        controller.step()
        assert follower.step_count == step + 1
        assert torch.equal(follower.threshold, controller.threshold)
    with pytest.raises(RuntimeError, match=r"expected step\(\) not to be called: sparsify got optimizer="):
        follower.step()
    assert follower.step_count == 6


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("hook", [True, False], ids=["optimizer=", "step()"])
@pytest.mark.parametrize("stop", [0, 1, 4, 9])
@pytest.mark.parametrize("final_rate", [0.9, 0.98])
@pytest.mark.filterwarnings("ignore:nothing survives")
def test_resume_continues_bit_for_bit(make, hook, stop, final_rate):
    def build(seed):
        model = net(seed)
        optimizer = make(model)
        controller = feather_param.sparsify(
            model, final_rate=final_rate, total_steps=10, optimizer=optimizer if hook else None
        )
        return model, optimizer, controller

    def run(model, optimizer, controller, steps):
        losses = []
        for step in steps:
            losses.append(train_step(model, optimizer, step))
            if not hook:
                controller.step()
        return losses

    parts = build(seed=0)
    run(*parts, range(stop))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    losses = run(*parts, range(stop, 12))
    resumed = build(seed=1)
    file.seek(0)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert run(*resumed, range(stop, 12)) == losses
    for key, value in parts[0].state_dict().items():
        assert torch.equal(value, resumed[0].state_dict()[key]), key
    assert resumed[2].state_dict() == parts[2].state_dict()


def test_the_models_state_dict_alone_is_enough_to_evaluate_and_bake():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    feather_param.sparsify(model, final_rate=0.9, total_steps=4, optimizer=optimizer)
    for step in range(4):
        train_step(model, optimizer, step)
    twin = net(seed=1)
    feather_param.sparsify(twin, final_rate=0.5, total_steps=1)
    twin.load_state_dict(model.state_dict())
    x, _ = batch(9)
    assert torch.equal(twin.eval()(x), model.eval()(x))
    feather_param.desparsify(twin)
    feather_param.desparsify(model)
    for key, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value)


@given(
    rate=st.floats(0.01, 0.99),
    values=st.lists(st.sampled_from([0.0, 0.5, -0.5, 1.0, 2.0]) | st.floats(-4, 4, width=16), min_size=8, max_size=8),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(max_examples=200, deadline=None)
def test_the_report_tells_what_desparsify_leaves(rate, values, dtype):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(values[:4]).view(2, 2))
        model[1].weight.copy_(torch.tensor(values[4:]).view(2, 2))
    if not 0 < round(rate * 8) < 8:
        return
    controller = feather_param.sparsify(model, final_rate=rate, total_steps=1, schedule=schedules.constant)
    k = round(rate * 8)
    expected = twins.zeros([model[0].parametrizations.weight.original, model[1].parametrizations.weight.original], k)
    t = controller.threshold.item()
    survivors = [int((layer.parametrizations.weight.original.abs() > t).sum()) for layer in model]
    dead = 0 in survivors  # what equals the threshold computes as nothing
    if dead:
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
    assert [row.total - row.zeros - row.ties for row in report.rows] == survivors
    if any(survivors):
        assert sum(row.survivor_share for row in report.rows) == pytest.approx(1.0)


def test_report_text():
    controller = feather_param.sparsify(net(), final_rate=0.5, total_steps=1, exclude="4", end_step=0)
    lines = str(controller.report()).splitlines()
    assert lines[0].split() == ["weight", "shape", "total", "zeros", "rate", "of", "all", "survivors"]
    assert lines[1].split()[:3] == ["0.weight", "8x3x3x3", "216"]
    assert lines[-2].split() == ["all", "2,264", "1,132", "50.000%", "100.00%"]
    assert lines[-1] == "dense: 4.weight (excluded)"
    assert len({len(line) for line in lines[:-1]}) == 1


def test_a_dying_layer_is_named_when_the_schedule_ends():
    model = net()
    with torch.no_grad():
        model[4].weight.mul_(1e-6)
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=4, end_step=2)
    controller.step()
    with pytest.warns(UserWarning, match=r"nothing survives in 4\.weight: .*lower final_rate, or .*exclude") as caught:
        controller.step()
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="nothing survives in 4") as caught:
        feather_param.desparsify(model)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_weight_is_named_and_the_controller_stays(value):
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
    assert isinstance(model[3], nn.utils.parametrize.ParametrizationList) or hasattr(model[3], "parametrizations")


def test_a_step_or_a_load_that_fails_leaves_threshold_and_theta():
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


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "circular"])
def test_stepping_keeps_the_training_flag_and_the_padding(padding_mode):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=padding_mode)).eval()
    feather_param.sparsify(model, final_rate=0.5, total_steps=1)
    assert not any(module.training for module in model.modules())


def test_the_repr_tells_where_it_stands():
    controller = feather_param.sparsify(net(), final_rate=0.9, total_steps=4)
    controller.step()
    assert repr(controller) == "Controller(rate=0.7875 of 0.9, step 1 of 4, 2,328 weights)"
    controller.freeze()
    assert repr(controller) == "Controller(rate=0.7875 of 0.9, step 1 of 4, 2,328 weights, frozen)"


def test_a_controller_ends_with_its_own_sparsity():
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


def test_other_hooks_of_the_optimizer_go_on():
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


def test_an_optimizer_of_some_of_the_weights_is_told_of():
    model = net()
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"does not train 0.weight, 3.weight, which will be pruned nevertheless"):
        feather_param.sparsify(model, final_rate=0.5, total_steps=4, optimizer=optimizer)


def test_a_run_may_be_made_longer():
    short = feather_param.sparsify(net(), final_rate=0.5, total_steps=4, end_step=2)
    short.step()
    longer = feather_param.sparsify(net(), final_rate=0.5, total_steps=8, end_step=2)
    longer.load_state_dict(short.state_dict())
    assert longer.step_count == 1


def test_weights_that_only_stand_for_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = nn.Linear(600, 600)
        feather = feather_param.parametrizations.feather_threshold(layer.weight, torch.tensor(0.1))
    assert feather.shape == (600, 600)


def test_a_schedule_that_fails_leaves_the_step_uncounted():
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


def test_a_noted_threshold_does_not_change():
    controller = feather_param.sparsify(net(), final_rate=0.9, total_steps=8)
    noted = []
    for _ in range(4):
        controller.step()
        noted.append(controller.threshold)
    assert [float(t) for t in noted] == sorted({float(t) for t in noted})


def test_a_layer_that_takes_no_parametrization_leaves_the_others_plain():
    class Stubborn(nn.Linear):
        def __setattr__(self, name, value):
            if name == "parametrizations":
                raise RuntimeError("no parametrization here")
            super().__setattr__(name, value)

    model = nn.Sequential(nn.Linear(4, 4), Stubborn(4, 4))
    with pytest.raises(RuntimeError, match="no parametrization here"):
        feather_param.sparsify(model, final_rate=0.5, total_steps=2)
    assert (type(model[0]), list(model[0].state_dict())) == (nn.Linear, ["weight", "bias"])
    feather_param.sparsify(model[0], final_rate=0.5, total_steps=2)


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    controller = feather_param.sparsify(net(), final_rate=numpy.float64(0.5), total_steps=numpy.int64(5))
    assert isinstance(controller.state_dict()["total_steps"], int)


@pytest.mark.parametrize("steps", [0, 1], ids=["never", "once"])
@pytest.mark.parametrize("bake", [lambda model, _: feather_param.desparsify(model), lambda _, c: c.desparsify()])
def test_a_desparsify_before_the_schedules_end_warns(steps, bake):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=4)
    for step in range(4):
        train_step(model, optimizer, step)
        if step < steps:
            controller.step()
    zeros = round(controller.rate * 2328)
    with pytest.warns(
        UserWarning, match=rf"after the 2,095 zeros .*got it at {zeros:,}: call controller.step"
    ) as caught:
        bake(model, controller)
    assert [warning.filename for warning in caught] == [__file__]
    assert twins.count_zeros(twins.prunable(model)) == zeros


def test_what_is_baked_or_frozen_early_on_purpose_does_not_warn():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=4)
    average = torch.optim.swa_utils.AveragedModel(model)
    controller.step()
    average.update_parameters(model)
    best = copy.deepcopy(model)
    feather_param.baked_state_dict(model)
    for copied in (average.module, best):
        feather_param.desparsify(copied)
    controller.freeze()
    controller.desparsify()


def test_a_deepcopy_with_a_controller_of_its_own_is_no_snapshot():
    model = net()
    model, controller = copy.deepcopy((model, feather_param.sparsify(model, **ARGS)))
    controller.step()
    with pytest.warns(UserWarning, match="call controller.step"):
        feather_param.desparsify(model)


def test_freezing_nothing_warns():
    controller = feather_param.sparsify(net(), **ARGS)
    with pytest.warns(
        UserWarning, match=r"freeze\(\) after the 2,095 zeros of final_rate are reached, got it at 0: call"
    ):
        controller.freeze()


def test_a_replaced_layer_is_told_of():
    model = net()
    controller = feather_param.sparsify(model, **ARGS, end_step=0)
    model[3] = nn.Linear(128, 16)
    with pytest.raises(
        ValueError, match=r"got a part of it with 280: .*if a layer was replaced after sparsify, put the"
    ):
        controller.desparsify()


def test_how_to_write_to_a_weight_that_is_sparsified():
    model = net()
    feather_param.sparsify(model, **ARGS, end_step=0)
    dense = model[4].parametrizations.weight.original
    before = dense.detach().clone()
    nn.init.ones_(model[4].weight)  # of what the forward pass sees, which is made anew each time
    model[4].reset_parameters()
    assert torch.equal(dense, before)
    with pytest.raises(KeyError):
        model[4].weight = nn.Parameter(torch.ones(4, 16))
    model[4].weight = torch.ones(4, 16)
    assert torch.equal(dense, torch.ones(4, 16))

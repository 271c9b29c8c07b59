"""Weights that somebody else wrote: what is evaluated is what is reported, baked and resumed."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.checkpoint import checkpoint

import feather_param
from feather_param.core import registration, versions
from tests import twins

N = 16 * 32 + 32 * 4
X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
Y = X[:, :4].argmax(1)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()


def run(steps: int = 8, **arguments):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    arguments = {"final_rate": 0.9, "total_steps": 8, "end_step": 4, "optimizer": optimizer, **arguments}
    controller = feather_param.sparsify(model, **arguments)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer, controller


def require_same(model: nn.Module, controller: feather_param.Controller | None, zeros: int) -> None:
    """Refuse a model that is evaluated, reported or shipped with other weights, or another number of zeros."""
    out = model(X)
    assert twins.count_zeros(layer.weight for layer in model[::2]) == zeros
    if controller is not None:
        assert controller.report().zeros == zeros
        assert sum(int((~mask).sum()) for mask in controller.masks().values()) == zeros
    plain = net(1)
    plain.load_state_dict(feather_param.baked_state_dict(model))
    assert twins.count_zeros(twins.prunable(plain)) == zeros
    assert torch.equal(plain(X), out)


WAYS = {
    "copy_": lambda p, value: p.copy_(value),
    "detach().copy_": lambda p, value: p.detach().copy_(value),
    ".data.copy_": lambda p, value: p.data.copy_(value),
    ".data =": lambda p, value: setattr(p, "data", value.clone()),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("factor", [0.3, 5.0])
def test_an_average_that_is_stored_swapped_in_and_restored(way, factor):
    model, optimizer, controller = run(4)
    for _ in range(3):
        step(model, optimizer)
        kept = [parameter.detach().clone() for parameter in model.parameters()]
        out = model.eval()(X)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), kept, strict=True):
                way(parameter, factor * value + 0.1 * torch.randn_like(value))
        require_same(model.eval(), controller, round(0.9 * N))
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), kept, strict=True):
                way(parameter, value)
        assert torch.equal(model.train()(X), out)


class ScheduleFree(torch.optim.Optimizer):
    """The way of schedule-free optimizers: the weights are averages while it is in evaluation mode."""

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "steps": 0})
        self.training = True

    def _move(self, weight: float) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data.lerp_(end=self.state[parameter]["z"], weight=weight)

    @torch.no_grad()
    def eval(self) -> None:
        self._move(1 - 1 / 0.9)

    @torch.no_grad()
    def train(self) -> None:
        self._move(1 - 0.9)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        group = self.param_groups[0]
        group["steps"] += 1
        for parameter in group["params"]:
            z = self.state[parameter].setdefault("z", parameter.detach().clone())
            parameter.lerp_(z, 1 / group["steps"])
            parameter.add_(parameter.grad, alpha=group["lr"] * (0.9 * (1 - 1 / group["steps"]) - 1))
            z.sub_(parameter.grad, alpha=group["lr"])


def schedule_free(parameters) -> torch.optim.Optimizer:
    schedulefree = pytest.importorskip("schedulefree")
    return schedulefree.AdamWScheduleFree(parameters, lr=0.05)


@pytest.mark.filterwarnings("ignore:nothing survives")
@pytest.mark.parametrize("make", [lambda p: ScheduleFree(p, lr=0.5), schedule_free], ids=["its way", "the package"])
@pytest.mark.parametrize("model_first", [True, False])
def test_schedule_free_optimizers(make, model_first):
    model = net()
    optimizer = make(model.parameters())
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=8, end_step=4, optimizer=optimizer)
    for _ in range(8):
        model.train()
        if hasattr(optimizer.param_groups[0], "train_mode") or not isinstance(optimizer, ScheduleFree):
            optimizer.train()
        step(model, optimizer)
    for part in (model, optimizer) if model_first else (optimizer, model):
        part.eval()
    # Its own swap goes through `.data`: it is seen if the model is put in evaluation mode after it.
    if model_first and isinstance(optimizer, ScheduleFree):
        controller.refresh()
    require_same(model, controller, round(0.9 * N))


def test_averaged_buffers_change_no_count():
    model, optimizer, controller = run(0)
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    for _ in range(8):
        step(model, optimizer)
        average.update_parameters(model)
    require_same(average.module.eval(), None, round(0.9 * N))
    pairs = zip(
        itertools.chain(model.parameters(), model.buffers()),
        itertools.chain(average.module.parameters(), average.module.buffers()),
        strict=True,
    )
    for mine, averaged in pairs:
        mine.data.copy_(averaged.data)
    require_same(model.eval(), controller, round(0.9 * N))


def test_buffers_that_are_copied_alone_leave_a_teacher_as_it_was():
    model, optimizer, _ = run(2)
    teacher = copy.deepcopy(model).eval()
    out = teacher(X)
    for _ in range(6):
        step(model, optimizer)
    for mine, theirs in zip(teacher.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)
    assert torch.equal(teacher(X), out)


def test_an_average_that_is_evaluated_between_its_updates():
    model, optimizer, controller = run(0, end_step=8)
    average = copy.deepcopy(model)
    for at in range(1, 9):
        step(model, optimizer)
        if at % 3 == 0:
            with torch.no_grad():
                for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
                    mine.lerp_(theirs, 0.5)
            zeros = controller.report().zeros  # as many as the model has when the average is looked at
            average(X)
        if at >= 3:
            require_same(average, None, zeros)


def test_a_soup_of_states():
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        states.append(run()[0].state_dict())
    model, _, controller = run()
    soup = {key: ((a.double() + states[1][key].double()) / 2).to(a.dtype) for key, a in states[0].items()}
    model.load_state_dict(soup)
    require_same(model, controller, round(0.9 * N))


def test_a_range_test_that_restores_the_model_restores_the_schedule():
    model, optimizer, controller = run(1)
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    for _ in range(5):
        step(model, optimizer)
    model.load_state_dict(before[0])
    optimizer.load_state_dict(before[1])
    assert controller.step_count == 1
    require_same(model, controller, round(twins.rate(1, 0.9, 0, 4) * N))
    step(model, optimizer)
    assert controller.step_count == 2


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("stop", [0, 2, 6])
def test_the_models_state_alone_resumes_bit_for_bit(frozen, compiled, stop):
    torch.compiler.reset()

    def start(seed):
        model = net(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        controller = feather_param.sparsify(model, final_rate=0.9, total_steps=8, end_step=4, optimizer=optimizer)
        forward = torch.compile(model, backend="eager") if compiled else model
        return model, optimizer, controller, forward

    def go_on(parts, steps):
        for at in steps:
            if frozen and at == 5:
                parts[2].freeze()
            step(parts[3], parts[1])

    whole, first, second = start(0), start(0), start(7)
    go_on(whole, range(8))
    go_on(first, range(stop))
    for part, twin in zip(first[:2], second[:2], strict=True):
        twin.load_state_dict(copy.deepcopy(part.state_dict()))
    go_on(second, range(stop, 8))
    assert second[2].state_dict() == whole[2].state_dict()
    for mine, theirs in zip(second[0].state_dict().values(), whole[0].state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_best_state_from_before_the_full_rate_warns_with_both_numbers():
    model, optimizer, controller = run(2)
    best, zeros = copy.deepcopy(model.state_dict()), controller.report().zeros
    for _ in range(6):
        step(model, optimizer)
    model.load_state_dict(best)
    with pytest.warns(UserWarning, match=rf"after the {round(0.9 * N)} zeros .* got it at {zeros}: call"):
        feather_param.desparsify(model)


@pytest.mark.parametrize("unfreeze", ["model", "controller"])
def test_a_state_from_before_the_freeze_thaws(unfreeze):
    model, optimizer, controller = run(2)
    state = copy.deepcopy({"model": model, "controller": controller}[unfreeze].state_dict())
    step(model, optimizer)
    controller.freeze()
    {"model": model, "controller": controller}[unfreeze].load_state_dict(state)
    assert controller.step_count == 2
    for _ in range(6):
        step(model, optimizer)
    require_same(model, controller, round(0.9 * N))


class InBackward:
    """An optimizer that steps each weight as soon as its gradient is there, as torch's tutorial has it."""

    def __init__(self, model: nn.Module) -> None:
        self.optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
        for parameter in self.optimizers:
            parameter.register_post_accumulate_grad_hook(self)

    def __call__(self, parameter: Tensor) -> None:
        self.optimizers[parameter].step()
        self.optimizers[parameter].zero_grad()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_with_an_optimizer_inside_the_backward_pass(use_reentrant):
    results = []
    for checkpointed in (True, False):
        torch.manual_seed(0)
        blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))
        controller = feather_param.sparsify(blocks, final_rate=0.8, total_steps=6, end_step=3)
        InBackward(blocks)
        for _ in range(6):
            x = X.clone().requires_grad_()
            for block in blocks:
                x = checkpoint(block, x, use_reentrant=use_reentrant) if checkpointed else block(x)
            x.square().mean().backward()
            controller.step()
        results.append([parameter.detach().clone() for parameter in blocks.parameters()])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


def test_refresh_where_nothing_tells_of_a_write():
    model, _, controller = run()
    for layer in model[::2]:
        layer.parametrizations.weight.original.data.mul_(torch.randn_like(layer.weight))
    controller.refresh()
    require_same(model, controller, round(0.9 * N))
    controller.freeze()
    frozen = controller.masks()
    model[0].parametrizations.weight.original.data.fill_(1.0)
    controller.refresh()
    assert torch.equal(model[0].parametrizations.weight.original != 0, frozen["0.weight"])
    feather_param.desparsify(model)
    with pytest.raises(RuntimeError, match=r"expected refresh\(\) before desparsify"):
        controller.refresh()


def test_a_copy_that_is_trained_by_itself_is_told_of():
    live, live_optimizer, controller = run(2)
    snapshot, controlled = copy.deepcopy(live), copy.deepcopy((live, controller))
    zeros = controller.report().zeros
    for network in (snapshot, controlled[0]):
        step(network, torch.optim.SGD(network.parameters(), lr=0.1))
        network(X)  # as many zeros as its source has: nothing to tell
    for _ in range(4):
        step(live, live_optimizer)
    for network in (snapshot, controlled[0]):
        step(network, torch.optim.SGD(network.parameters(), lr=0.1))
    require_same(*controlled, zeros)
    with pytest.warns(UserWarning, match=rf"trained, and no controller steps it: it had {zeros} .* takes the 576 of"):
        snapshot(X)
    require_same(snapshot, None, 576)


def test_a_pass_of_a_copy_looks_at_each_weight_a_few_times(monkeypatch):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(60)))
    feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0)
    calls = []

    def counted(tensors, writes_to=versions.writes_to):
        calls.append(1)
        return writes_to(tensors)

    for module in (registration, versions):
        monkeypatch.setattr(module, "writes_to", counted)
    counts = []
    for network in (model, copy.deepcopy(model)):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.1)
        for _ in range(2):
            calls.clear()
            network(torch.ones(1, 4))
            counts.append(len(calls))
    assert counts[1] == counts[3] <= 2 * 60  # all once by the first one, and each by itself
    assert max(counts) <= 6 * 60  # where they have moved


def test_a_tensor_that_gets_the_id_of_one_that_is_gone_is_another_one():
    """FSDP2 gathers weights into new tensors: what is seen there must not be looked at."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0)
    threshold = controller.threshold
    place = model[0].parametrizations.weight
    values, kept, gone = torch.ones(4, 4), [], id(place.original)
    del place.original
    while id(found := nn.Parameter(values)) != gone:
        kept.append(found)
        if len(kept) > 10_000:
            pytest.skip("this allocator gives no address twice")
    place.register_parameter("original", found)
    with torch.no_grad():
        found.add_(1.0)
    model(torch.ones(1, 4))
    assert torch.equal(model[0].parametrizations.weight[0].threshold, threshold)
    assert not torch.equal(controller.threshold, threshold)


def test_masks_are_those_of_a_bake_whatever_was_written_without_a_word():
    for change in (lambda w: w.mul_(2.0), lambda w: w.mul_(0.5), lambda w: w.neg_(), lambda w: w.copy_(w.flip(0))):
        model, _, controller = run()
        model.eval()(X)
        change(model[0].parametrizations.weight.original.data)
        masks, state = controller.masks(), feather_param.baked_state_dict(model)
        assert all(torch.equal(state[name] != 0, mask) for name, mask in masks.items())


def test_masks_of_a_copy_with_its_controller_are_those_of_a_bake():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=9, end_step=9)
    controller.step()
    twin, its = copy.deepcopy((model, controller))
    for _ in range(4):
        controller.step()
    weight = twin[0].parametrizations.weight.original.data
    weight.neg_().view(-1)[weight.abs().argmax()].mul_(2.0)  # as many above the threshold as before
    masks, state = its.masks(), feather_param.baked_state_dict(twin)
    assert all(torch.equal(state[name] != 0, mask) for name, mask in masks.items())


def test_masks_take_no_roots(monkeypatch):
    model, _, controller = run()
    expected = {f"{i}.weight": model[i].weight != 0 for i in (0, 2)}
    monkeypatch.setattr(feather_param.core.baking, "feather_threshold", None)
    monkeypatch.setattr(feather_param.parametrizations, "feather_threshold", None)
    assert all(torch.equal(mask, expected[name]) for name, mask in controller.masks().items())
    assert controller.report().zeros == round(0.9 * N)

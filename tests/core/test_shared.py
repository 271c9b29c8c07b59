"""Thresholds are recomputed when the weights have changed, and masks follow from these thresholds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import feather_param
from tests.core.classifier import INPUTS, SIZE, make_step, require_agreement, trained_classifier
from tests.core.models import linear_net, sparsify_at_once, train_on_noise, weights_by_name, zeros_in_pass
from tests.training import all_equal, zero_where_masked

WRITES = {
    "copy_": lambda parameter, value: parameter.copy_(value),
    "detach().copy_": lambda parameter, value: parameter.detach().copy_(value),
    ".data.copy_": lambda parameter, value: parameter.data.copy_(value),
    ".data =": lambda parameter, value: setattr(parameter, "data", value.clone()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("factor", [0.3, 5.0])
def test_other_weights_that_are_evaluated_for_a_while_have_their_own_threshold(write, factor):
    model, optimizer, controller = trained_classifier(4)
    for _ in range(3):
        make_step(model, optimizer)
        stored = [parameter.detach().clone() for parameter in model.parameters()]
        output = model.eval()(INPUTS)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), stored, strict=True):
                write(parameter, factor * value + 0.1 * torch.randn_like(value))
        require_agreement(model.eval(), controller, round(0.9 * SIZE))
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), stored, strict=True):
                write(parameter, value)
        assert torch.equal(model.train()(INPUTS), output)


class ScheduleFree(torch.optim.Optimizer):
    """SGD by the schedule-free method: in evaluation mode the weights are averages."""

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


def schedulefree_adamw(parameters) -> torch.optim.Optimizer:
    schedulefree = pytest.importorskip("schedulefree")
    return schedulefree.AdamWScheduleFree(parameters, lr=0.05)


@pytest.mark.filterwarnings("ignore:nothing survives")
@pytest.mark.parametrize(
    "make", [lambda parameters: ScheduleFree(parameters, lr=0.5), schedulefree_adamw], ids=["method", "package"]
)
@pytest.mark.parametrize("model_first", [True, False])
def test_the_averages_of_a_schedule_free_optimizer_have_their_own_threshold(make, model_first):
    model = linear_net()
    optimizer = make(model.parameters())
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=8, end_step=4, optimizer=optimizer)
    for _ in range(8):
        model.train()
        if not isinstance(optimizer, ScheduleFree):
            optimizer.train()
        make_step(model, optimizer)
    for part in (model, optimizer) if model_first else (optimizer, model):
        part.eval()
    # `ScheduleFree.eval` writes to `.data`, which torch does not count. So a model that entered evaluation mode first
    # has to be refreshed.
    if model_first and isinstance(optimizer, ScheduleFree):
        controller.refresh()
    require_agreement(model, controller, round(0.9 * SIZE))


def test_refresh_recomputes_the_threshold_after_writes_that_torch_does_not_count():
    model, _, controller = trained_classifier()
    for layer in model[::2]:
        layer.parametrizations.weight.original.data.mul_(torch.randn_like(layer.weight))
    controller.refresh()
    require_agreement(model, controller, round(0.9 * SIZE))


def test_refresh_restores_the_zeros_of_frozen_weights_and_is_refused_after_desparsify():
    model, _, controller = trained_classifier()
    controller.freeze()
    masks = controller.masks()
    model[0].parametrizations.weight.original.data.fill_(1.0)
    controller.refresh()
    assert torch.equal(model[0].parametrizations.weight.original != 0, masks["0.weight"])
    feather_param.desparsify(model)
    with pytest.raises(RuntimeError, match=r"expected refresh\(\) before desparsify"):
        controller.refresh()


class OptimizerInBackward:
    """Steps each Parameter as soon as its gradient is computed, as in torch's tutorial."""

    def __init__(self, model: nn.Module) -> None:
        self.optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
        for parameter in self.optimizers:
            parameter.register_post_accumulate_grad_hook(self)

    def __call__(self, parameter: Tensor) -> None:
        self.optimizers[parameter].step()
        self.optimizers[parameter].zero_grad()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_with_an_optimizer_in_the_backward_pass_trains_the_same_weights(use_reentrant):
    results = []
    for checkpointed in (True, False):
        torch.manual_seed(0)
        blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))
        controller = feather_param.sparsify(blocks, final_rate=0.8, total_steps=6, end_step=3)
        OptimizerInBackward(blocks)
        for _ in range(6):
            x = INPUTS.clone().requires_grad_()
            for block in blocks:
                x = checkpoint(block, x, use_reentrant=use_reentrant) if checkpointed else block(x)
            x.square().mean().backward()
            controller.step()
        results.append([parameter.detach().clone() for parameter in blocks.parameters()])
    assert all_equal(*results)


def test_two_passes_agree_when_layers_are_called_in_another_order_than_registered():
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body = nn.Linear(32, 4), nn.Linear(16, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).relu())

    x = torch.ones(3, 16)
    model = HeadFirst()
    sparsify_at_once(model, 0.8)
    model(x)
    with torch.no_grad():
        model.head.parametrizations.weight.original.mul_(20)
    assert torch.equal(model(x), model(x))
    with torch.no_grad():
        model.body.parametrizations.weight.original.mul_(20)
    model.head(torch.ones(1, 32))  # a pass of one layer only
    model.eval()
    assert zeros_in_pass(model) == round(0.8 * 640)


def test_a_functional_call_uses_its_own_buffers_and_writes_to_none():
    x = torch.ones(3, 16)
    model = linear_net(outputs=16)
    controller = feather_param.sparsify(model, final_rate=0.8, total_steps=10, end_step=5)
    train_on_noise(model, controller, 2)
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    early = {name: value.clone() for name, value in model.named_buffers()}
    output = model(x)
    train_on_noise(model, controller, 4)
    late = {name: value.clone() for name, value in model.named_buffers()}
    passed = {name: value.clone() for name, value in early.items()}
    assert torch.equal(torch.func.functional_call(model, {**parameters, **passed}, (x,)), output)
    for buffers, before in ((passed, early), (dict(model.named_buffers()), late)):
        assert all(torch.equal(buffers[name], value) for name, value in before.items())
    assert zeros_in_pass(model) == 819


# -- masks


def test_the_masks_after_writes_that_torch_does_not_count_are_those_of_a_bake():
    for change in (lambda w: w.mul_(2.0), lambda w: w.mul_(0.5), lambda w: w.neg_(), lambda w: w.copy_(w.flip(0))):
        model, _, controller = trained_classifier()
        model.eval()(INPUTS)
        change(model[0].parametrizations.weight.original.data)
        masks, state = controller.masks(), feather_param.baked_state_dict(model)
        assert zero_where_masked(state, masks)


def test_masks_and_reports_do_not_apply_the_operator(monkeypatch):
    model, _, controller = trained_classifier()
    weights = {name: weight.detach() for name, weight in weights_by_name(model).items()}
    monkeypatch.setattr(feather_param.patterns, "feather_threshold", None)
    assert zero_where_masked(weights, controller.masks())
    assert controller.report().zeros == round(0.9 * SIZE)


def test_a_shallow_copy_of_a_model_computes_thresholds_for_changed_weights_too():
    """`nn.DataParallel` makes such copies."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0)
    model(torch.ones(1, 4))
    replicas = [layer.parametrizations.weight[0]._replicate_for_data_parallel() for layer in model]
    with torch.no_grad():
        for layer in model:
            layer.parametrizations.weight.original.mul_(3.0)
    before = model[0].parametrizations.weight[0].threshold.clone()
    replicas[0](model[0].parametrizations.weight.original)
    assert torch.allclose(model[0].parametrizations.weight[0].threshold, 3.0 * before)

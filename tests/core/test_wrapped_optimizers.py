"""Optimizers inside wrappers (accelerate's, Lookahead)."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

import feather_param
from tests.core.optimizer_runs import random_conv_net, sgd
from tests.training import all_equal, zeros_in


class Wrapper(torch.optim.Optimizer):
    """Like accelerate's: it has the parameter groups of the optimizer inside, but no hooks."""

    def __init__(self, optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Lookahead(Wrapper):
    """Every second step, it moves the weights back half of the distance to its own."""

    def __init__(self, optimizer) -> None:
        super().__init__(optimizer)
        self.slow, self.steps = [p.detach().clone() for p in self.param_groups[0]["params"]], 0

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        self.steps += 1
        if self.steps % 2 == 0:
            for slow, parameter in zip(self.slow, self.param_groups[0]["params"], strict=True):
                parameter.copy_(slow.lerp_(parameter, 0.5))
        return loss


class WithStepHooks(Lookahead):
    """Like timm's Lookahead, it has tables of hooks for `step` and no others, and no constructor was called."""

    def __init__(self, optimizer) -> None:
        super().__init__(optimizer)
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self.defaults = optimizer.defaults


class PlainWrapper:
    """An object of a trainer that is no torch.optim.Optimizer."""

    def __init__(self, optimizer) -> None:
        self._optimizer = optimizer

    def step(self):
        self._optimizer.step()


def accelerated(optimizer):
    return pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(optimizer)


WRAPPERS = {
    "Wrapper": Wrapper,
    "Lookahead": Lookahead,
    "WithStepHooks": WithStepHooks,
    "PlainWrapper": PlainWrapper,
    "two wrappers": lambda optimizer: Wrapper(Wrapper(optimizer)),
    "accelerate": accelerated,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_optimizer_inside_a_wrapper_is_followed(wrap):
    model = random_conv_net()
    optimizer = wrap(sgd(model))
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, end_step=2, optimizer=optimizer)
    for i in range(4):
        model(torch.randn(2, 3, 6, 6)).square().sum().backward()
        optimizer.step()
        assert controller.step_count == i + 1
    evaluated = [model[i].weight.detach().clone() for i in (0, 3, 4)]
    feather_param.desparsify(model)
    assert zeros_in(model) == 1164
    assert all_equal(evaluated, [model[i].weight for i in (0, 3, 4)])


def test_the_optimizer_inside_a_wrapper_whose_gradients_were_set_to_zero_is_followed():
    model = random_conv_net()
    optimizer = WithStepHooks(sgd(model))
    optimizer.zero_grad()  # torch now prepares the step of the class to call hooks
    assert WithStepHooks.step.hooked
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, optimizer=optimizer)
    model(torch.randn(2, 3, 6, 6)).square().sum().backward()
    optimizer.step()
    assert controller.step_count == 1


class TwoInside(torch.optim.Optimizer):
    """A wrapper of two optimizers."""

    def __init__(self, *optimizers) -> None:
        self.a, self.b = optimizers

    def step(self, closure=None): ...


class NoneInside(torch.optim.Optimizer):
    """An optimizer that does not call the constructor of its base class."""

    def __init__(self, optimizer) -> None:
        self.param_groups = optimizer.param_groups

    def step(self, closure=None): ...


@pytest.mark.parametrize(
    "make", [NoneInside, lambda optimizer: TwoInside(optimizer, optimizer)], ids=["none inside", "two inside"]
)
def test_a_wrapper_of_no_optimizer_or_of_two_is_refused_and_the_model_does_not_change(make):
    model = random_conv_net()
    optimizer = make(sgd(model))
    with pytest.raises(
        TypeError, match=r"expected an optimizer whose step\(\) calls hooks, got .*pass the optimizer that"
    ):
        feather_param.sparsify(model, final_rate=0.5, total_steps=4, optimizer=optimizer)
    assert list(model.state_dict()) == list(random_conv_net().state_dict())
    feather_param.sparsify(model, final_rate=0.5, total_steps=4)

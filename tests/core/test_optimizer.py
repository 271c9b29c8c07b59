"""The optimizer that a controller follows: which steps count, also in subclasses and compiled code."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

import feather_param
from tests.core.optimizer_runs import Run, make_step, random_conv_net, sgd


def number_of_hooks(optimizer: torch.optim.Optimizer) -> list[int]:
    return [
        len(optimizer._optimizer_step_post_hooks),
        len(optimizer._optimizer_state_dict_post_hooks),
        len(optimizer._optimizer_load_state_dict_pre_hooks),
    ]


# -- follow


def test_following_the_same_optimizer_again_counts_each_step_once():
    model = random_conv_net()
    optimizer = sgd(model)
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, optimizer=optimizer)
    controller.follow(optimizer)
    make_step(model, optimizer)
    assert controller.step_count == 1
    assert number_of_hooks(optimizer) == [1, 1, 1]


def test_following_another_optimizer_ends_the_following_of_the_first():
    model = random_conv_net()
    first, second = sgd(model), sgd(model)
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, optimizer=first)
    controller.follow(second)
    assert (number_of_hooks(first), number_of_hooks(second)) == ([0, 0, 0], [1, 1, 1])
    make_step(model, first)
    assert controller.step_count == 0
    make_step(model, second)
    assert controller.step_count == 1
    assert "feather_param" not in first.state_dict()


@pytest.mark.parametrize("step_after_desparsify", [True, False])
def test_hooks_do_not_accumulate_when_a_model_is_sparsified_and_baked_several_times(step_after_desparsify):
    model = random_conv_net()
    optimizer = sgd(model)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    for i in range(3):
        controller = feather_param.sparsify(model, final_rate=0.5, total_steps=2, optimizer=optimizer)
        make_step(model, optimizer)
        assert controller.step_count == 1
        feather_param.desparsify(model)
        if step_after_desparsify:
            with pytest.warns(UserWarning, match="stepped a model that was desparsified"):
                make_step(model, optimizer)
        assert number_of_hooks(optimizer) == [2, 1, 1]
        assert len(calls) == (i + 1) * (1 + step_after_desparsify)


def test_a_copied_controller_follows_no_optimizer_until_follow_is_called():
    model = random_conv_net()
    optimizer = sgd(model, momentum=0.9)
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, end_step=3, optimizer=optimizer)
    make_step(model, optimizer)
    stepped_model, stepped, stepped_optimizer = copy.deepcopy((model, controller, optimizer))
    following_model, following, followed_optimizer = copy.deepcopy((model, controller, optimizer))
    following.follow(followed_optimizer)
    for _ in range(2):
        make_step(model, optimizer)
        make_step(stepped_model, stepped_optimizer)
        stepped.step()
        make_step(following_model, followed_optimizer)
    assert controller.step_count == stepped.step_count == following.step_count == 3
    assert controller.threshold == stepped.threshold == following.threshold
    with pytest.raises(RuntimeError, match=r"expected step\(\) not to be called"):
        following.step()
    stepped.desparsify()
    make_step(model, optimizer)
    assert controller.step_count == 4
    assert stepped.step_count == 3


REFUSED = {
    "no optimizer": (lambda: "sgd", TypeError, "expected optimizer to be a torch.optim.Optimizer, got str"),
    "another model's": (
        lambda: sgd(random_conv_net()),
        ValueError,
        r"expected an optimizer of this model's weights, got one that holds none .*parameters\(\), after fully_shard",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_a_refused_optimizer_leaves_the_followed_one(make, error, message):
    model = random_conv_net()
    optimizer = sgd(model)
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, optimizer=optimizer)
    with pytest.raises(error, match=message):
        controller.follow(make())
    make_step(model, optimizer)
    assert controller.step_count == 1


def test_follow_and_step_are_refused_after_desparsify():
    model = random_conv_net()
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, end_step=0)
    feather_param.desparsify(model)
    with pytest.raises(RuntimeError, match=r"expected follow\(\) before desparsify"):
        controller.follow(sgd(model))
    model = random_conv_net()
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4, end_step=0, optimizer=sgd(model))
    feather_param.desparsify(model)
    with pytest.raises(RuntimeError, match=r"expected step\(\) before desparsify"):
        controller.step()


def test_an_optimizer_of_some_of_the_weights_is_followed_with_a_warning():
    model = random_conv_net()
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4)
    with pytest.warns(UserWarning, match=r"does not train 0.weight, 3.weight, and they will be pruned") as caught:
        controller.follow(sgd(model[4]))
    assert [warning.filename for warning in caught] == [__file__]


@pytest.fixture
def one_process():
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
        pytest.skip("FSDP2 of torch 2.6 does not run on a CPU")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()
    dist.destroy_process_group()


def test_an_optimizer_of_sharded_weights_is_followed_and_its_state_is_loaded(one_process):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def build():
        model = random_conv_net()
        controller = feather_param.sparsify(model, final_rate=0.5, total_steps=4)
        too_early = torch.optim.Adam(model.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"got one that holds none of them: .* after fully_shard"):
            controller.follow(too_early)
        optimizer = torch.optim.Adam(model.parameters())
        controller.follow(optimizer)
        return model, controller, optimizer

    model, controller, optimizer = build()
    for _ in range(2):
        make_step(model, optimizer)
    assert controller.step_count == 2
    assert controller.report().zeros == 1164
    names = optimizer.state_dict()["feather_param"][0][0]
    assert names[:2] == ["0.bias", "0.weight"]
    other_model, other_controller, other_optimizer = build()
    set_optimizer_state_dict(other_model, other_optimizer, get_optimizer_state_dict(model, optimizer))
    other_controller.load_state_dict(controller.state_dict())
    assert other_controller.step_count == 2
    for other, parameter in zip(other_model.parameters(), model.parameters(), strict=True):
        loaded, saved = other_optimizer.state[other]["exp_avg"], optimizer.state[parameter]["exp_avg"]
        assert loaded.shape == other.shape
        assert torch.equal(loaded.full_tensor(), saved.full_tensor())


# -- which steps count


class Clipping(torch.optim.Adam):
    """An optimizer whose step calls that of its base class, and may fail."""

    fails = False

    def step(self, closure=None):
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1.0)
        loss = super().step(closure)
        if self.fails:
            raise FloatingPointError("overflow")
        return loss


@pytest.mark.parametrize("plain_first", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_that_calls_the_step_of_its_base_class_counts_once(plain_first, compiled):
    if plain_first:
        torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # torch patches the step of Adam for its first instance
    torch.compiler.reset()
    model = nn.Linear(8, 8)
    optimizer = Clipping(model.parameters(), lr=0.01)
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=9, optimizer=optimizer)
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    for i in range(1, 5):
        model(torch.ones(2, 8)).sum().backward()
        step()
        assert controller.step_count == i


def test_a_step_that_raises_does_not_count_and_a_later_one_does():
    model = nn.Linear(8, 8)
    optimizer = Clipping(model.parameters(), lr=0.01)
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=9, optimizer=optimizer)
    for fails, count in ((True, 0), (True, 0), (False, 1), (True, 1), (False, 2)):
        optimizer.fails = fails
        model(torch.ones(2, 8)).sum().backward()
        try:
            optimizer.step()
        except FloatingPointError:
            assert fails
        assert controller.step_count == count


@pytest.mark.parametrize("followed", [True, False])
@pytest.mark.parametrize("whole", [True, False], ids=["whole step", "optimizer.step"])
def test_a_compiled_training_step_counts_and_prunes_as_an_eager_one(followed, whole):
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = nn.Linear(16, 16)
        optimizer = sgd(model)
        controller = feather_param.sparsify(
            model, final_rate=0.9, total_steps=6, optimizer=optimizer if followed else None
        )

        def train_step(x, model=model, optimizer=optimizer, controller=controller):
            if whole:
                model(x).square().sum().backward()
            optimizer.step()
            if not followed:
                controller.step()

        call = torch.compile(train_step, backend="eager") if compiled else train_step
        for i in range(6):
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(i))
            if not whole:
                model(x).square().sum().backward()
            call(x)
            optimizer.zero_grad()
        results.append((controller.step_count, int((model.weight == 0).sum()), controller.report().zeros))
    assert results == [(6, 230, 230)] * 2


def test_the_step_by_which_torch_distributed_checkpoint_creates_a_state_does_not_count():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    first = Run(random_conv_net, torch.optim.Adam, built_first=False).follow().train()
    state = get_optimizer_state_dict(first.model, first.optimizer)
    second = Run(random_conv_net, torch.optim.Adam, built_first=False).follow()
    second.model.load_state_dict(first.model.state_dict())
    set_optimizer_state_dict(second.model, second.optimizer, state)
    assert second.controller.step_count == first.controller.step_count == 2


def test_a_step_does_not_keep_local_variables_of_the_caller_alive():
    model = nn.Linear(8, 8)
    optimizer = sgd(model)
    feather_param.sparsify(model, final_rate=0.5, total_steps=2, optimizer=optimizer)
    activations = torch.ones(3)
    reference = weakref.ref(activations)
    optimizer.step()
    del activations
    assert reference() is None

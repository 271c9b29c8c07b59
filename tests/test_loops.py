"""Training loops: optimizers and the features of torch that people switch on."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import feather_param
from tests.network import WEIGHTS, batch, net, train_step
from tests.training import all_equal, zeros_in

ZEROS = round(0.9 * WEIGHTS)


def sparsify(model: nn.Module, **arguments) -> feather_param.Controller:
    return feather_param.sparsify(model, final_rate=0.9, total_steps=6, end_step=4, **arguments)


def train(model, controller, optimizer, steps=range(6)) -> None:
    for step in steps:
        train_step(model, optimizer, step)
        controller.step()


def bake_and_count(model: nn.Module) -> None:
    """Desparsify and check that the number of zeros is exact and that all numbers are finite."""
    feather_param.desparsify(model)
    assert zeros_in(model) == ZEROS
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


# -- optimizers -------------------------------------------------------------------------------------------------------


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True),
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("follows", [True, False], ids=["optimizer=", "step()"])
def test_training_with_any_optimizer_of_torch_gives_the_exact_number_of_zeros(make, follows):
    model = net()
    optimizer = make(model.parameters())
    controller = sparsify(model, optimizer=optimizer) if follows else sparsify(model)
    for step in range(6):
        train_step(model, optimizer, step)
        if not follows:
            controller.step()
    assert controller.step_count == 6
    bake_and_count(model)


def test_training_with_lbfgs_gives_the_exact_number_of_zeros():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    controller = sparsify(model)
    for step in range(6):
        x, y = batch(step)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        controller.step()
    bake_and_count(model)


# -- gradients --------------------------------------------------------------------------------------------------------


def test_accumulated_gradients_equal_those_of_one_large_batch():
    whole, accumulated = net().eval(), net().eval()  # in train mode, the batch statistics would differ
    for model, pieces in ((whole, 1), (accumulated, 4)):
        controller = sparsify(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(6):
            x, y = batch(step)
            optimizer.zero_grad()
            for xs, ys in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
                (F.cross_entropy(model(xs), ys) / pieces).backward()
            optimizer.step()
            controller.step()
    for one, other in zip(whole.parameters(), accumulated.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # sums in another order, over six steps
    bake_and_count(accumulated)


def test_gradients_may_be_clipped_and_a_layer_may_be_excluded_from_training():
    model = net()
    model[3].weight.requires_grad_(False)
    before = model[3].weight.detach().clone()
    controller = sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm.isfinite()
        optimizer.step()
        controller.step()
    assert torch.equal(model[3].parametrizations.weight.original, before)
    bake_and_count(model)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_does_not_change_the_training(use_reentrant):
    model, same = net(), net()
    for sequence, checkpointed in ((model, True), (same, False)):
        controller = sparsify(sequence)
        optimizer = torch.optim.SGD(sequence.parameters(), lr=0.1)
        for step in range(6):
            x, y = batch(step)
            x.requires_grad_()
            if checkpointed:
                hidden = checkpoint(sequence[3], sequence[:3](x), use_reentrant=use_reentrant)
            else:
                hidden = sequence[:4](x)
            optimizer.zero_grad()
            F.cross_entropy(sequence[4](hidden), y).backward()
            optimizer.step()
            controller.step()
    assert all_equal(model.parameters(), same.parameters())
    bake_and_count(model)


def test_torch_func_computes_the_gradient_of_each_sample():
    model = net().eval()
    controller = sparsify(model, schedule=feather_param.schedules.constant)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    buffers = dict(model.named_buffers())
    x, y = batch(0)

    def loss(parameters, x, y):
        out = torch.func.functional_call(model, (parameters, buffers), (x[None],))
        return F.cross_entropy(out, y[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    F.cross_entropy(model(x), y).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(each[name].mean(0), parameter.grad, rtol=1e-4, atol=1e-6)
    assert controller.step_count == 0


# -- mixed and low precision ------------------------------------------------------------------------------------------


def test_a_step_that_a_grad_scaler_skips_is_not_counted():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = sparsify(model, optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(6):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        scaler.scale(loss * (float("inf") if step == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert controller.step_count == 5
    bake_and_count(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_desparsify_does_not_change_the_output_under_autocast(dtype):
    model = net()
    controller = sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6):
        x, y = batch(step)
        with torch.autocast("cpu", dtype=dtype):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        controller.step()
    x, _ = batch(9)
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        out = model.eval()(x)
        bake_and_count(model)
        assert torch.equal(model(x), out)  # the operator runs in the precision of the weight, and autocast rounds later


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_may_have_half_precision(dtype):
    model = net().to(dtype)
    controller = sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(6):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(dtype)).float(), y).backward()
        optimizer.step()
        controller.step()
    assert controller.threshold.dtype == torch.float32
    bake_and_count(model)


# -- other calls between the steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_an_evaluation_between_steps_does_not_change_the_training(mode):
    model, same = net(), net()
    for sequence, evaluate in ((model, True), (same, False)):
        controller = sparsify(sequence)
        optimizer = torch.optim.SGD(sequence.parameters(), lr=0.1)
        for step in range(6):
            train(sequence, controller, optimizer, [step])
            if evaluate:
                with mode():
                    sequence.eval()(batch(100)[0])
                sequence.train()
    assert all_equal(model.parameters(), same.parameters())


def test_a_controller_may_step_in_inference_mode():
    model = net()
    controller = sparsify(model)
    with torch.inference_mode():
        controller.step()
    train(model, controller, torch.optim.SGD(model.parameters(), lr=0.1), range(5))
    bake_and_count(model)


def test_the_cache_of_torch_parametrize_does_not_change_the_output():
    model = net()
    controller = sparsify(model, schedule=feather_param.schedules.constant)
    x, _ = batch(0)
    out = model.eval()(x)
    with torch.nn.utils.parametrize.cached():
        assert torch.equal(model(x), out)
        assert torch.equal(model(x), out)
    assert controller.report().zeros == ZEROS


def test_a_baked_state_dict_is_exact_while_training_continues():
    model = net()
    controller = sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, controller, optimizer, range(4))
    state = copy.deepcopy(feather_param.baked_state_dict(model))
    train(model, controller, optimizer, range(4, 6))
    saved = net()
    saved.load_state_dict(state)
    assert zeros_in(saved) == ZEROS
    bake_and_count(model)

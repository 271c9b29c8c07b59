"""Any training loop: the features people switch on, alone and together."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import feather_param
from tests import twins

K, N = round(0.9 * 2328), 2328


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 16), nn.Linear(16, 4))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 6, 6, generator=generator), torch.randint(4, (8,), generator=generator)


def sparse(model: nn.Module, **arguments) -> feather_param.Controller:
    return feather_param.sparsify(model, final_rate=0.9, total_steps=6, end_step=4, **arguments)


def plain_loop(model, controller, optimizer, steps=range(6)) -> None:
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        controller.step()


def baked_exactly(model: nn.Module) -> None:
    feather_param.desparsify(model)
    assert twins.count_zeros(twins.prunable(model)) == K
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


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
@pytest.mark.parametrize("hooked", [True, False], ids=["optimizer=", "step()"])
def test_optimizers(make, hooked):
    model = net()
    optimizer = make(model.parameters())
    controller = sparse(model, optimizer=optimizer) if hooked else sparse(model)
    for step in range(6):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if not hooked:
            controller.step()
    assert controller.step_count == 6
    baked_exactly(model)


def test_lbfgs():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    controller = sparse(model)
    for step in range(6):
        x, y = batch(step)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        controller.step()
    baked_exactly(model)


def test_accumulated_gradients_are_those_of_one_large_batch():
    one, parts = net().eval(), net().eval()  # eval: batch statistics would differ
    for model, pieces in ((one, 1), (parts, 4)):
        controller = sparse(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(6):
            x, y = batch(step)
            optimizer.zero_grad()
            for xs, ys in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
                (F.cross_entropy(model(xs), ys) / pieces).backward()
            optimizer.step()
            controller.step()
    for mine, theirs in zip(one.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)  # sums in another order, over six steps
    baked_exactly(parts)


def test_a_step_that_a_grad_scaler_skips_is_not_counted():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = sparse(model, optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(6):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        scaler.scale(loss * (float("inf") if step == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert controller.step_count == 5
    baked_exactly(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    model = net()
    controller = sparse(model)
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
        baked_exactly(model)
        assert torch.equal(model(x), out)  # the cut is made in the weight's own precision, then rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_that_are_half_precision_themselves(dtype):
    model = net().to(dtype)
    controller = sparse(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(6):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(dtype)).float(), y).backward()
        optimizer.step()
        controller.step()
    assert controller.threshold.dtype == torch.float32
    baked_exactly(model)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    model, same = net(), net()
    for sequence, inside in ((model, True), (same, False)):
        controller = sparse(sequence)
        optimizer = torch.optim.SGD(sequence.parameters(), lr=0.1)
        for step in range(6):
            x, y = batch(step)
            x.requires_grad_()
            hidden = (
                checkpoint(sequence[3], sequence[:3](x), use_reentrant=use_reentrant) if inside else sequence[:4](x)
            )
            optimizer.zero_grad()
            F.cross_entropy(sequence[4](hidden), y).backward()
            optimizer.step()
            controller.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    baked_exactly(model)


def test_torch_func():
    model = net().eval()
    controller = sparse(model, schedule=feather_param.schedules.constant)
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


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_evaluating_in_between_changes_nothing(mode):
    model, same = net(), net()
    for sequence, evaluate in ((model, True), (same, False)):
        controller = sparse(sequence)
        optimizer = torch.optim.SGD(sequence.parameters(), lr=0.1)
        for step in range(6):
            plain_loop(sequence, controller, optimizer, [step])
            if evaluate:
                with mode():
                    sequence.eval()(batch(100)[0])
                sequence.train()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


def test_stepping_the_controller_in_inference_mode():
    model = net()
    controller = sparse(model)
    with torch.inference_mode():
        controller.step()
    plain_loop(model, controller, torch.optim.SGD(model.parameters(), lr=0.1), range(5))
    baked_exactly(model)


def test_parametrize_cached():
    model = net()
    controller = sparse(model, schedule=feather_param.schedules.constant)
    x, _ = batch(0)
    out = model.eval()(x)
    with torch.nn.utils.parametrize.cached():
        assert torch.equal(model(x), out)
        assert torch.equal(model(x), out)
    assert controller.report().zeros == K


def test_both_ways_of_stepping_are_caught():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = sparse(model, optimizer=optimizer)
    with pytest.raises(RuntimeError, match=r"expected step\(\) not to be called: sparsify got optimizer="):
        controller.step()


def test_gradient_clipping_and_frozen_layers():
    model = net()
    model[3].weight.requires_grad_(False)
    before = model[3].weight.detach().clone()
    controller = sparse(model)
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
    baked_exactly(model)


def test_the_model_is_baked_while_a_copy_trains():
    model = net()
    controller = sparse(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain_loop(model, controller, optimizer, range(4))
    state = copy.deepcopy(feather_param.baked_state_dict(model))
    plain_loop(model, controller, optimizer, range(4, 6))
    saved = net()
    saved.load_state_dict(state)
    assert twins.count_zeros(twins.prunable(saved)) == K
    baked_exactly(model)

"""The gradient of the operator: its values, its memory, and the transforms of torch.func and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from feather_param.ops.operator import _SMALL, feather_threshold
from feather_param.ops.operator_cpu import _CHUNK
from tests import twins
from tests.ops.tensors import POWERS, normal, t


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [10, _CHUNK + 17], ids=["whole", "in chunks"])
def test_the_gradient_is_that_of_the_result_times_1_if_kept_and_theta_if_pruned(p, theta, size):
    weight = normal(size).requires_grad_()
    upstream = normal(size, seed=1)
    feather_threshold(weight, t(0.5), theta, p).backward(upstream)
    assert torch.equal(weight.grad, upstream * twins.slope(weight, 0.5, theta).float())


def test_the_gradient_is_correct_if_few_elements_are_kept():
    weight = normal(_CHUNK + 7).requires_grad_()
    feather_threshold(weight, t(2.0), 0.25).sum().backward()
    assert torch.equal(weight.grad, torch.where(weight.detach().abs() > 2.0, 1.0, 0.25))


def test_the_gradient_can_be_differentiated():
    weight = normal(_SMALL + 7).requires_grad_()
    out = feather_threshold(weight, t(0.5), 0.25) ** 2
    (slope,) = torch.autograd.grad(out.sum(), weight, create_graph=True)
    slope.sum().backward()
    expected = 2 * twins.slope(weight, 0.5, 0.25).float() ** 2
    assert torch.equal(weight.grad, expected)


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("theta", "expected"), [(1.0, 0), (0.5, 1)])
@pytest.mark.parametrize("size", [1000, _CHUNK * 2], ids=["whole", "in chunks"])
def test_the_backward_pass_needs_one_byte_an_element_and_none_if_theta_is_1(theta, expected, size):
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.nbytes)
        return tensor

    weight = normal(size).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        feather_threshold(weight, t(0.5), theta)
    assert sum(saved) == expected * size


def test_the_storage_of_the_weight_can_be_resized_after_a_forward_pass():
    weight = normal(10).requires_grad_()
    feather_threshold(weight, t(0.5), 0.25)
    weight.untyped_storage().resize_(0)  # as FSDP does with weights that it has gathered


# -- transforms -------------------------------------------------------------------------------------------------------


def test_autograd_computes_batched_gradients():
    weight = normal(_SMALL + 7).requires_grad_()
    out = feather_threshold(weight, t(0.5), 0.25)
    upstream = normal(2, len(weight), seed=1)
    (got,) = torch.autograd.grad(out, weight, upstream, is_grads_batched=True)
    assert torch.equal(got, upstream * twins.slope(weight, 0.5, 0.25).float())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's forward mode causes it
@pytest.mark.parametrize("size", [50, _SMALL + 7], ids=["whole", "in chunks"])
def test_vmap_and_forward_mode_can_transform_the_backward_pass(size):
    weight = normal(size).requires_grad_()
    slope = twins.slope(weight, 0.5, 0.25).float()
    out = feather_threshold(weight, t(0.5), 0.25)
    upstream = normal(2, size, seed=1)
    rows = torch.func.vmap(lambda v: torch.autograd.grad(out, weight, v, retain_graph=True)[0])(upstream)
    assert torch.equal(rows, upstream * slope)
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.ones(size), torch.full((size,), 2.0))
        (grad,) = torch.autograd.grad((feather_threshold(weight, t(0.5), 0.25) * x).sum(), weight)
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(grad).tangent, 2 * slope)


@pytest.mark.parametrize("theta", [1.0, 0.5, torch.tensor(0.25)], ids=str)
@pytest.mark.parametrize("size", [50, _CHUNK + 5], ids=["whole", "in chunks"])
def test_grad_and_vmap_of_torch_func_apply_to_the_operator(theta, size):
    weight = normal(size)
    slope = twins.slope(weight, 0.5, float(theta)).float()

    def f(w):
        return feather_threshold(w, t(0.5), theta)

    assert torch.equal(torch.func.grad(lambda w: f(w).sum())(weight), slope)
    batch = torch.stack([weight, 2 * weight])
    assert torch.equal(torch.func.vmap(f)(batch), torch.stack([f(weight), f(2 * weight)]))
    rows = torch.func.vmap(torch.func.grad(lambda w: f(w).sum()))(batch)
    assert torch.equal(rows[0], slope)
    columns = torch.func.vmap(f, in_dims=1, out_dims=1)(batch.T)
    assert torch.equal(columns.T, torch.stack([f(weight), f(2 * weight)]))
    thresholds = torch.tensor([0.1, 0.9])
    for batched, dim in ((weight, None), (batch, 0)):
        outs = torch.func.vmap(lambda w, s: feather_threshold(w, s, theta), in_dims=(dim, 0))(batched, thresholds)
        one, two = (weight, weight) if dim is None else batch
        assert torch.equal(outs[0], feather_threshold(one, thresholds[0], theta))
        assert torch.equal(outs[1], feather_threshold(two, thresholds[1], theta))

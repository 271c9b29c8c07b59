"""The operator: values, gradients, memory, function transforms; and the parametrization as a module."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

import feather_param
from feather_param.allocations import Budget
from feather_param.core.config import Config
from feather_param.ops.operator import _SMALL, _cube_root
from feather_param.ops.operator_cpu import _CHUNK
from feather_param.parametrizations import FeatherParametrization, SharedSparsity, feather_threshold
from tests import twins

POWERS = [1.0, 1.5, 2.0, 3.0, 4.0, 7.3, 50.0, math.inf]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def t(value: float) -> Tensor:
    return torch.tensor(value)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compiled(weight: Tensor, threshold: Tensor, p: float) -> Tensor:
    """The operator as torch.compile traces it, run operation by operation."""
    torch.compiler.reset()
    return torch.compile(feather_threshold, fullgraph=True, backend="aot_eager")(weight, threshold, p=p)


@pytest.mark.parametrize("operator", [feather_threshold, compiled])
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("threshold", [0.0, 1e-20, 0.3, 1.0])
def test_operator_is_the_equation_to_a_few_ulp(operator, p, threshold):
    edge = t(threshold).float()
    near = [edge]
    for _ in range(50):
        near.append(torch.nextafter(near[-1], t(math.inf)))
    weight = torch.cat([normal(2000), torch.stack(near), -torch.stack(near), normal(500, seed=1) * 1e-18])
    expected = twins.operator(weight, float(edge), p)
    got = operator(weight, edge, p=p).double()
    # Roundings of (|w| - t) / |w|, of the polynomial, of the exponent 1/p (times |ln ratio| < 17), of the
    # power and of the product; a root divides what comes before it. 8 half-ulps hold them all.
    assert ((got - expected).abs() <= 8 * 2.0**-24 * expected.abs()).all()
    assert torch.equal(got == 0, expected == 0)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_result_is_the_fp32_result_rounded_to_the_weights_dtype(p, dtype):
    weight = normal(4000, dtype=dtype)
    got = feather_threshold(weight, t(0.3), p=p)
    wide = torch.promote_types(dtype, torch.float32)
    assert got.dtype == dtype
    assert torch.equal(got, feather_threshold(weight.to(wide), t(0.3), p=p).to(dtype))


@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    threshold=st.floats(0.0, 2.0**100, width=32),
    p=st.floats(1.0, 60.0) | st.just(math.inf),
)
@settings(max_examples=300, deadline=None)
def test_operator_for_any_input(values, threshold, p):
    weight = torch.tensor(values)
    out = feather_threshold(weight, t(threshold), p=p)
    kept = weight.abs() > threshold
    assert (out[~kept] == 0).all()
    assert not torch.signbit(out[~kept]).any()  # no -0.0
    assert (out[kept].sign() == weight[kept].sign()).all()  # kept weights are never 0, and keep their sign
    assert (out[kept].abs() <= weight[kept].abs() * (1 + 2**-22)).all()
    if threshold == 0:
        assert torch.equal(out, weight)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [10, _CHUNK + 17], ids=["whole", "in chunks"])
def test_gradient_is_straight_through(p, theta, size):
    weight = normal(size).requires_grad_()
    upstream = normal(size, seed=1)
    feather_threshold(weight, t(0.5), theta, p).backward(upstream)
    assert torch.equal(weight.grad, upstream * twins.slope(weight, 0.5, theta).float())


@pytest.mark.parametrize("operator", [feather_threshold, compiled])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", POWERS)
def test_zero_threshold_is_the_identity(operator, p, dtype):
    weight = normal(1000, dtype=dtype)
    assert torch.equal(operator(weight, t(0.0), p=p), weight)


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_compiled_whatever_the_default_dtype(default):
    weight = normal(1000)
    expected = compiled(weight, t(0.5), 3.0)
    torch.set_default_dtype(default)
    try:
        got = compiled(weight, torch.tensor(0.5, dtype=torch.float32), 3.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch cannot compile a transform of such a function there")
def test_compiled_under_vmap():
    weight = normal(3, 50)
    torch.compiler.reset()
    rows = torch.compile(torch.func.vmap(lambda row: feather_threshold(row, t(0.5))), backend="aot_eager")(weight)
    torch.testing.assert_close(rows, feather_threshold(weight, t(0.5)))


def test_the_cube_root_of_compiled_code():
    u = torch.cat([2.0**-24 * torch.arange(1, 4097), torch.logspace(-7, 0, 100_000), 1 - torch.logspace(-7, 0, 1000)])
    x = ((u - 3) * u + 3) * u  # what it is asked for: from 2^-24 to 1
    expected = x.double() ** (1 / 3)
    # Half an ulp (of up to 2^-23) each for y, for z in it, twice, and for the sum; the series end below 2^-26.
    assert ((_cube_root(x) - expected).abs() <= 4 * 2.0**-24 * expected).all()
    assert _cube_root(torch.ones(1)) == 1.0


def test_nan_stays_visible():
    weight = torch.tensor([math.nan, 0.1, 2.0])
    assert feather_threshold(weight, t(0.5)).isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("theta", [1.0, 0.5])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.5], ids=["identity", "computing all", "computing survivors"])
def test_a_large_weight_in_chunks_equals_its_parts(theta, p, dtype, threshold):
    weight = normal(_CHUNK * 2 + 3, dtype=dtype)
    weight[5] = math.nan
    # These p use correctly rounded operations only; a power may differ by position within a SIMD register.
    whole = feather_threshold(weight, t(threshold), theta, p)
    parts = torch.cat([feather_threshold(part, t(threshold), theta, p) for part in weight.split(1000)])
    assert torch.equal(whole.nan_to_num(9.0), parts.nan_to_num(9.0))
    assert whole.isnan().sum() == 1


@pytest.mark.parametrize("theta", [0.25])
def test_the_gradient_where_only_survivors_are_computed(theta):
    weight = normal(_CHUNK + 7).requires_grad_()
    feather_threshold(weight, t(2.0), theta).sum().backward()
    assert torch.equal(weight.grad, torch.where(weight.detach().abs() > 2.0, 1.0, theta))


def test_batched_gradients():
    weight = normal(_SMALL + 7).requires_grad_()
    out = feather_threshold(weight, t(0.5), 0.25)
    upstream = normal(2, len(weight), seed=1)
    (got,) = torch.autograd.grad(out, weight, upstream, is_grads_batched=True)
    assert torch.equal(got, upstream * twins.slope(weight, 0.5, 0.25).float())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, on the way to forward mode
@pytest.mark.parametrize("size", [50, _SMALL + 7], ids=["whole", "in parts"])
def test_the_backward_pass_may_be_transformed(size):
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


def test_tracers_that_do_not_compile():
    traced = make_fx(lambda w, s: feather_threshold(w, s, 0.25))(normal(50), t(0.5))
    weight = normal(50, seed=1)
    torch.testing.assert_close(traced(weight, t(0.5)), feather_threshold(weight, t(0.5)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert feather_threshold(weight, t(0.5), 0.25).shape == weight.shape


def test_large_weights_at_the_end_of_the_interpreter():
    code = (
        "import threading, time, torch\n"
        "from feather_param.parametrizations import feather_threshold\n"
        "from feather_param.ops.kth import kth_magnitude\n"
        "torch.set_num_threads(2)\n"
        "w = torch.linspace(-1, 1, (1 << 23) + 5)\n"
        "def late():\n"
        "    threading.main_thread().join()\n"
        "    t = kth_magnitude({'w': w}, len(w) // 2)\n"
        "    assert abs(int((feather_threshold(w, t) == 0).sum()) - len(w) // 2) <= 1\n"
        "    print('done')\n"
        "threading.Thread(target=late).start()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


def test_the_gradient_has_a_gradient():
    weight = normal(_SMALL + 7).requires_grad_()
    out = feather_threshold(weight, t(0.5), 0.25) ** 2
    (slope,) = torch.autograd.grad(out.sum(), weight, create_graph=True)
    slope.sum().backward()
    expected = 2 * twins.slope(weight, 0.5, 0.25).float() ** 2
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_about_a_threshold_that_the_dtype_cannot_hold(dtype):
    weight = normal(100, dtype=dtype)
    for threshold in (
        0.3,
        1e-9,
        7e4,
        math.inf,
        *(0.5 * (1 + d * 2.0**-13) for d in range(-3, 4)),
        float(weight[0].abs()),
    ):
        kept = weight.abs().float() > t(threshold)
        assert torch.equal(feather_threshold(weight, t(threshold)) != 0, kept)
    weight[3] = 0.0
    weight.requires_grad_()
    lost = feather_threshold(weight, t(math.nan), 0.5)
    lost.sum().backward()
    assert lost.isnan().all()
    assert (weight.grad == 1).all()
    assert feather_threshold(weight, t(math.nan), p=math.inf).equal(weight)


def test_numpys_errors_are_not_the_operators():
    weight = torch.tensor([math.inf, math.nan, 0.0, 1.0])
    with np.errstate(all="raise"):
        for dtype in DTYPES:
            assert feather_threshold(weight.to(dtype), t(1e-9)).isnan().tolist() == [True, True, False, False]


def test_the_weights_storage_can_still_be_resized():
    weight = normal(10).requires_grad_()
    feather_threshold(weight, t(0.5), 0.25)
    weight.untyped_storage().resize_(0)  # as FSDP does with weights that it has gathered


LAYOUTS = {
    "contiguous": lambda w: w,
    "channels_last": lambda w: w.to(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda w: torch.stack([w, w], -1)[..., 0],
    "expanded": lambda w: w[:1].expand_as(w),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (64, 64, 8, 8)], ids=["whole", "in chunks"])
@pytest.mark.parametrize("theta", [1.0, 0.5])
def test_memory_layouts(layout, shape, theta):
    weight = LAYOUTS[layout](normal(*shape))
    expected = feather_threshold(weight.contiguous().flatten(), t(0.5)).view(shape)
    leaf = weight.detach().requires_grad_()
    out = feather_threshold(leaf, t(0.5), theta)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert torch.equal(leaf.grad, twins.slope(weight, 0.5, theta).float() if weight.numel() < 999 else leaf.grad)
    if layout == "channels_last":
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (1,), (1, 1, 1, 1), ()])
def test_empty_and_single(shape):
    weight = torch.full(shape, 2.0, requires_grad=True)
    out = feather_threshold(weight, t(1.0), 0.5)
    assert out.shape == shape
    out.sum().backward()


@pytest.mark.parametrize(("theta", "expected"), [(1.0, 0), (0.5, 1)])
@pytest.mark.parametrize("size", [1000, _CHUNK * 2], ids=["whole", "in chunks"])
def test_bytes_saved_for_backward(theta, expected, size):
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.nbytes)
        return tensor

    weight = normal(size).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        feather_threshold(weight, t(0.5), theta)
    assert sum(saved) == expected * size


@pytest.mark.parametrize("theta", [1.0, 0.5, torch.tensor(0.25)], ids=str)
@pytest.mark.parametrize("size", [50, _CHUNK + 5], ids=["whole", "in chunks"])
def test_torch_func(theta, size):
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


@pytest.mark.parametrize("theta", [1.0, 0.5])
@pytest.mark.parametrize("p", [1.0, 2.5, 3.0, math.inf])
def test_compiled_agrees_with_eager_in_one_graph(theta, p):
    torch._dynamo.reset()
    compiled = torch.compile(lambda w, s: feather_threshold(w, s, theta, p), fullgraph=True, backend="aot_eager")
    weight = normal(500).requires_grad_()
    for threshold in (0.0, 0.3, 0.6):
        out = compiled(weight, t(threshold))
        # Both are the equation to 8 half-ulps (see above), by different roots.
        eager = feather_threshold(weight, t(threshold), theta, p)
        assert ((out - eager).abs() <= 16 * 2.0**-24 * eager.abs()).all()
        assert torch.equal(out == 0, eager == 0)
        weight.grad = None
        out.sum().backward()
        assert torch.equal(weight.grad, twins.slope(weight, float(t(threshold)), theta).float())


def sparse_linear(threshold: float = 0.5) -> nn.Module:
    layer = nn.Linear(4, 3)
    feather = FeatherParametrization(SharedSparsity(Config(final_rate=0.5), Budget({"weight": 12})))
    feather.threshold.fill_(threshold)
    parametrize.register_parametrization(layer, "weight", feather)
    return layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_threshold_keeps_its_precision_through_dtype_casts(dtype):
    layer = sparse_linear(1 / 3).to(dtype)
    assert layer.parametrizations.weight[0].threshold == t(1 / 3)
    assert layer.weight.dtype == dtype


def test_the_threshold_follows_devices():
    layer = sparse_linear().to("meta")
    assert layer.parametrizations.weight[0].threshold.device.type == "meta"


def test_a_deepcopy_has_its_own_threshold():
    layer = sparse_linear()
    twin = copy.deepcopy(layer)
    layer.parametrizations.weight[0].threshold.fill_(9.0)
    assert twin.parametrizations.weight[0].threshold == 0.5
    assert (layer.weight == 0).all()
    assert not (twin.weight == 0).all() or (twin.parametrizations.weight.original.abs() <= 0.5).all()


def test_assigning_the_weight_stores_the_dense_weight():
    layer = sparse_linear(0.5)
    layer.weight = torch.full((3, 4), 0.25)
    assert (layer.parametrizations.weight.original == 0.25).all()
    assert (layer.weight == 0).all()


def test_repr_names_the_settings():
    assert "p=3.0, theta=1.0" in repr(sparse_linear())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("features", [10, 200], ids=["small", "large"])
def test_a_sparsified_model_can_be_traced(features):
    model = nn.Sequential(nn.Linear(features, features), nn.ReLU())
    feather_param.sparsify(model, final_rate=0.9, total_steps=1, end_step=0)
    x = torch.randn(3, features)
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))
    program = torch.export.export(model, (x,))
    assert torch.allclose(program.module()(x), model(x), atol=1e-6)

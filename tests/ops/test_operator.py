"""The values of the operator: the equation, dtypes, memory layouts, chunks on a CPU, and compiled code."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from feather_param.ops.operator import _cube_root, feather_threshold
from feather_param.ops.operator_cpu import _CHUNK
from tests import twins
from tests.ops.tensors import DTYPES, POWERS, normal, t


def compiled(weight: Tensor, threshold: Tensor, p: float) -> Tensor:
    """Run the graph that torch.compile traces of the operator, one operation after the other."""
    torch.compiler.reset()
    return torch.compile(feather_threshold, fullgraph=True, backend="aot_eager")(weight, threshold, p=p)


@pytest.mark.parametrize("operator", [feather_threshold, compiled])
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("threshold", [0.0, 1e-20, 0.3, 1.0])
def test_the_operator_equals_the_equation_within_rounding(operator, p, threshold):
    edge = t(threshold).float()
    near = [edge]
    for _ in range(50):
        near.append(torch.nextafter(near[-1], t(math.inf)))
    weight = torch.cat([normal(2000), torch.stack(near), -torch.stack(near), normal(500, seed=1) * 1e-18])
    expected = twins.operator(weight, float(edge), p)
    got = operator(weight, edge, p=p).double()
    # The roundings are those of (|w| - t) / |w|, of the polynomial, of the exponent 1/3 (times |ln ratio| < 17), of the
    # power and of the product. A root divides the errors made before it. All together are below 8 half-ulps.
    # For p = 1/2: 2 of u, 1/2 of 1 - u, 1 of the sum, 1 of the quotient; twice that for the square, 1 of it, 1 of the
    # product. Other exponents are computed in float64. Results below 2^-126 have absolute errors of at most 2^-149.
    half_ulps = 11 if p == 0.5 else 8
    assert ((got - expected).abs() <= half_ulps * 2.0**-24 * expected.abs() + 2.0**-149).all()
    kept = weight.abs() > edge
    assert torch.equal((got != 0)[expected.abs() >= 2.0**-126], kept[expected.abs() >= 2.0**-126])
    assert (got[~kept] == 0).all()


@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    threshold=st.floats(0.0, 2.0**100, width=32),
    p=st.floats(1.0, 60.0) | st.just(math.inf),
)
@settings(max_examples=300)
def test_kept_elements_keep_their_sign_and_do_not_grow(values, threshold, p):
    weight = torch.tensor(values)
    out = feather_threshold(weight, t(threshold), p=p)
    kept = weight.abs() > threshold
    assert (out[~kept] == 0).all()
    assert not torch.signbit(out[~kept]).any()  # 0.0, not -0.0
    assert (out[kept].sign() == weight[kept].sign()).all()  # so no kept element is 0
    assert (out[kept].abs() <= weight[kept].abs() * (1 + 2**-22)).all()
    if threshold == 0:
        assert torch.equal(out, weight)


@pytest.mark.parametrize("operator", [feather_threshold, compiled])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", POWERS)
def test_a_zero_threshold_returns_the_weight(operator, p, dtype):
    weight = normal(1000, dtype=dtype)
    assert torch.equal(operator(weight, t(0.0), p=p), weight)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (1,), (1, 1, 1, 1), ()])
def test_a_weight_may_be_empty_or_have_one_element(shape):
    weight = torch.full(shape, 2.0, requires_grad=True)
    out = feather_threshold(weight, t(1.0), 0.5)
    assert out.shape == shape
    out.sum().backward()


# -- dtypes, NaN and memory layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_computed_in_float32_or_float64_and_rounded_to_the_dtype_of_the_weight(p, dtype):
    weight = normal(4000, dtype=dtype)
    got = feather_threshold(weight, t(0.3), p=p)
    wide = torch.promote_types(dtype, torch.float32)
    assert got.dtype == dtype
    assert torch.equal(got, feather_threshold(weight.to(wide), t(0.3), p=p).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_threshold_that_the_dtype_of_the_weight_cannot_hold_is_not_rounded(dtype):
    weight = normal(100, dtype=dtype)
    near_half = [0.5 * (1 + d * 2.0**-13) for d in range(-3, 4)]
    for threshold in (0.3, 1e-9, 7e4, math.inf, *near_half, float(weight[0].abs())):
        kept = weight.abs().float() > t(threshold)
        assert torch.equal(feather_threshold(weight, t(threshold)) != 0, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_nan_threshold_gives_nan_and_the_gradient_of_kept_elements(dtype):
    weight = normal(100, dtype=dtype)
    weight[3] = 0.0
    weight.requires_grad_()
    out = feather_threshold(weight, t(math.nan), 0.5)
    out.sum().backward()
    assert out.isnan().all()
    assert (weight.grad == 1).all()
    assert feather_threshold(weight, t(math.nan), p=math.inf).equal(weight)


def test_a_nan_in_the_weight_stays_nan():
    weight = torch.tensor([math.nan, 0.1, 2.0])
    assert feather_threshold(weight, t(0.5)).isnan().tolist() == [True, False, False]


def test_infinity_and_nan_raise_no_error_of_numpy():
    weight = torch.tensor([math.inf, math.nan, 0.0, 1.0])
    with np.errstate(all="raise"):
        for dtype in DTYPES:
            assert feather_threshold(weight.to(dtype), t(1e-9)).isnan().tolist() == [True, True, False, False]


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
def test_result_and_gradient_do_not_depend_on_the_memory_layout(layout, shape, theta):
    weight = LAYOUTS[layout](normal(*shape))
    expected = feather_threshold(weight.contiguous().flatten(), t(0.5)).view(shape)
    leaf = weight.detach().requires_grad_()
    out = feather_threshold(leaf, t(0.5), theta)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert torch.equal(leaf.grad, torch.where(weight.abs() > 0.5, 1.0, theta))
    if layout == "channels_last":
        assert out.is_contiguous(memory_format=torch.channels_last)


# -- chunks and threads on a CPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [1.0, 0.5])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.5], ids=["all kept", "half kept", "few kept"])
def test_a_weight_computed_in_chunks_equals_its_parts_computed_alone(theta, p, dtype, threshold):
    weight = normal(_CHUNK * 2 + 3, dtype=dtype)
    weight[5] = math.nan
    # With these p, all operations are correctly rounded. A power may depend on the position in a SIMD register.
    whole = feather_threshold(weight, t(threshold), theta, p)
    parts = torch.cat([feather_threshold(part, t(threshold), theta, p) for part in weight.split(1000)])
    assert torch.equal(whole.nan_to_num(9.0), parts.nan_to_num(9.0))
    assert whole.isnan().sum() == 1


def test_large_weights_are_computed_while_the_interpreter_shuts_down():
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


# -- compiled and traced code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [1.0, 0.5])
@pytest.mark.parametrize("p", [1.0, 2.5, 3.0, math.inf])
def test_compiled_code_is_one_graph_and_agrees_with_eager_code(theta, p):
    torch._dynamo.reset()
    compiled = torch.compile(lambda w, s: feather_threshold(w, s, theta, p), fullgraph=True, backend="aot_eager")
    weight = normal(500).requires_grad_()
    for threshold in (0.0, 0.3, 0.6):
        out = compiled(weight, t(threshold))
        # Each of the two is within 8 half-ulps of the equation (see above), and they compute different roots.
        eager = feather_threshold(weight, t(threshold), theta, p)
        assert ((out - eager).abs() <= 16 * 2.0**-24 * eager.abs()).all()
        assert torch.equal(out == 0, eager == 0)
        weight.grad = None
        out.sum().backward()
        assert torch.equal(weight.grad, twins.slope(weight, float(t(threshold)), theta).float())


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_compiled_code_does_not_depend_on_the_default_dtype(default):
    weight = normal(1000)
    expected = compiled(weight, t(0.5), 3.0)
    torch.set_default_dtype(default)
    try:
        got = compiled(weight, torch.tensor(0.5, dtype=torch.float32), 3.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)


@pytest.mark.skipif(torch.__version__ < "2.7", reason="older torch cannot compile vmap of an autograd function")
def test_vmap_of_the_operator_can_be_compiled():
    weight = normal(3, 50)
    torch.compiler.reset()
    rows = torch.compile(torch.func.vmap(lambda row: feather_threshold(row, t(0.5))), backend="aot_eager")(weight)
    torch.testing.assert_close(rows, feather_threshold(weight, t(0.5)))


def test_the_cube_root_of_compiled_code_is_exact_within_rounding():
    u = torch.cat([2.0**-24 * torch.arange(1, 4097), torch.logspace(-7, 0, 100_000), 1 - torch.logspace(-7, 0, 1000)])
    x = ((u - 3) * u + 3) * u  # the operator takes roots of these numbers, from 2^-24 to 1
    expected = x.double() ** (1 / 3)
    # The error is half an ulp (at most 2^-24) each for y, for z, which is used twice, and for the sum. The series end
    # below 2^-26.
    assert ((_cube_root(x) - expected).abs() <= 4 * 2.0**-24 * expected).all()
    assert _cube_root(torch.ones(1)) == 1.0


def test_the_operator_can_be_traced_without_values():
    traced = make_fx(lambda w, s: feather_threshold(w, s, 0.25))(normal(50), t(0.5))
    weight = normal(50, seed=1)
    torch.testing.assert_close(traced(weight, t(0.5)), feather_threshold(weight, t(0.5)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert feather_threshold(weight, t(0.5), 0.25).shape == weight.shape


def test_a_large_fake_tensor_gives_a_fake_result():
    with FakeTensorMode():
        out = feather_threshold(torch.nn.Linear(600, 600).weight, torch.tensor(0.1))
    assert out.shape == (600, 600)

"""The kernel computes what the dense layer does, and touches no other memory."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from feather_param.inference.engine import kernel, matrix, plan
from tests.inference.layer_cases import LAYERS, drawn_convolution, rows_of
from tests.inference.matrices import ACTIVATIONS, assert_computes, computed, matrix_of
from tests.inference.pruned import pruned


@pytest.fixture(autouse=True)
def scratch_of_nan(monkeypatch):
    """Fill the kernel's memory with NaN, which must not reach the output."""
    monkeypatch.setattr(plan, "new_scratch", lambda floats: torch.full((floats,), math.nan))


@pytest.fixture(params=[1, 2, 3, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer(name, threads):
    layer, shape = LAYERS[name]
    for rows in rows_of(pruned(layer, 0.6)):
        assert_computes(layer, torch.randn(shape), rows=rows)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["linear", "linear, one token", "conv2d", "conv2d, 1x1, aligned", "conv2d, large"])
def test_every_activation_with_and_without_a_residual(name, activation):
    layer, shape = LAYERS[name]
    for rows in rows_of(pruned(layer, 0.6)):
        x = 4 * torch.randn(shape)
        assert_computes(layer, x, rows=rows, activation=activation)
        if not isinstance(layer, nn.Linear):
            residual = torch.randn_like(layer(x))
            assert_computes(layer, x, residual, rows=rows, activation=activation)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_a_convolution_of_any_geometry(data):
    dims = data.draw(st.integers(1, 3))
    layer, sizes = drawn_convolution(data, dims, 16, 20 if dims == 2 else 6)
    pruned(layer, data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])))
    x = torch.randn(data.draw(st.integers(1, 9)), 4, *sizes)
    residual = torch.randn_like(layer(x)) if data.draw(st.booleans()) else None
    activation = data.draw(st.sampled_from(sorted(ACTIVATIONS)))
    before = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.sampled_from([1, 2, 3])))
    cached = data.draw(st.sampled_from([matrix.CACHED, 500]))  # with 500 bytes, the matrix has several parts
    try:
        with mock.patch.multiple(matrix, CACHED=cached, COLUMNS=2):
            assert_computes(layer, x, residual, data.draw(st.sampled_from([1, 4])), activation)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 200), st.integers(1, 80), st.integers(1, 10), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_a_linear_layer_of_any_sizes(tokens, channels, blocks, rate):
    layer = pruned(nn.Linear(channels, 4 * blocks), rate)
    for rows in (1, 4):
        assert_computes(layer, torch.randn(tokens, channels), rows=rows)


def test_infinite_inputs_reach_only_outputs_with_a_weight_for_them():
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    for tokens in (1, 3):
        x = torch.tensor([[1.0, math.inf, math.nan]] * tokens)
        assert torch.equal(computed(layer, x), torch.tensor([[1.0, math.inf]] * tokens))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_nan(activation):
    layer = pruned(nn.Conv2d(1, 4, 1), 0.0)
    x = torch.full((1, 1, 5, 5), math.nan)
    for rows in (1, 4):
        assert computed(layer, x, rows=rows, activation=activation).isnan().all()


def test_several_threads_may_call_it(threads):
    layers = [pruned(LAYERS[name][0]) for name in ("conv2d", "linear", "conv2d, 1x1")]
    given_ = [LAYERS[name][1] for name in ("conv2d", "linear", "conv2d, 1x1")]
    calls = [(layer, torch.randn(n, *shape[1:])) for layer, shape in zip(layers, given_, strict=True) for n in (1, 4)]
    calls *= 10
    expected = [computed(*call) for call in calls]

    def compute(call):
        torch.set_num_threads(threads)  # of OpenMP, for this thread
        return computed(*call)

    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(compute, calls), expected))


def test_one_plan_in_several_threads():
    layer = pruned(nn.Conv2d(8, 8, 3, padding=1))
    planned = plan.Plan(matrix_of(layer), (1,), (30, 30))
    inputs = [torch.randn(1, 8, 30, 30) for _ in range(40)]

    def compute(x):
        y = torch.empty(1, 8, 30, 30)
        planned.run(x, y)
        return y

    expected = [compute(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(compute, inputs), expected))


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_no_other_memory_is_touched():
    subprocess.run([sys.executable, "-m", "tests.inference.guarded"], check=True, timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_computes_with_one_thread():
    code = """
import os, torch
from torch import nn
from feather_param.inference.engine import kernel, plan
from tests.inference.matrices import matrix_of
torch.set_num_threads(2)
planned = plan.Plan(matrix_of(nn.Conv2d(4, 4, 3)), (1,), (9, 9))
x = torch.randn(1, 4, 9, 9)
def compute():
    y = x.new_zeros(1, 4, 7, 7)
    planned.run(x, y)
    return y.tolist()
expected = compute()
pid = os.fork()
if pid:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
assert compute() == expected
assert kernel.available_threads() == 1
os._exit(0)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_waits_until_no_thread_compiles():
    code = """
import os, threading, time
from feather_param.inference.engine import kernel
begun, ended = threading.Event(), []
def compile():
    begun.set()
    time.sleep(0.5)
    ended.append(True)
    return None, 7
thread = threading.Thread(target=kernel._process.address, args=(compile,))
thread.start()
begun.wait()
pid = os.fork()
assert ended
assert kernel._process.address(compile) == 7
assert kernel._process.address(lambda: (None, 8)) == 8
if pid:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
os._exit(0)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


def test_where_torch_has_another_openmp_it_uses_one_thread(monkeypatch, threads):
    monkeypatch.setattr(kernel, "_openmp", dict)
    assert kernel.available_threads() == 1
    for name in ("conv2d", "linear", "linear, one token"):
        layer, shape = LAYERS[name]
        assert_computes(pruned(layer), torch.randn(shape))


def test_without_llvmlite_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    monkeypatch.setattr(kernel, "_process", kernel._Process())
    with pytest.raises(
        ImportError, match=r"expected llvmlite to be installed: pip install 'feather_param\[inference\]'"
    ):
        computed(nn.Linear(3, 4), torch.randn(2, 3))


def test_the_package_does_not_import_llvmlite():
    code = "import sys, feather_param.inference.engine.plan; sys.exit('llvmlite' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_linear_layer_takes_no_residual():
    layer, x = nn.Linear(3, 4), torch.randn(2, 3)
    with pytest.raises(ValueError, match="expected no residual for a Linear layer"):
        computed(layer, x, layer(x).detach())

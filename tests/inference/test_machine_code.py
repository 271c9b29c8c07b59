"""The parts of the machine code compute what they should, for this processor and for others."""

from __future__ import annotations

import ctypes
import itertools
import platform

import numpy as np
import pytest
import torch
from llvmlite import binding, ir

from feather_param.inference.engine import kernel, machine_code
from feather_param.inference.engine.activations import activated, exponential
from feather_param.inference.engine.job import LANES, Activation
from feather_param.inference.engine.tile import Tile
from feather_param.inference.engine.transposing import write_transpose
from feather_param.inference.engine.workers import Worker
from feather_param.inference.engine.writer import I64, POINTER, Writer, integer
from tests.inference.layer_cases import LAYERS, rows_of
from tests.inference.matrices import assert_computes
from tests.inference.pruned import pruned

EPS = float(np.finfo(np.float32).eps)


def mapped(write, x):
    """Return the results of code for a vector, for each float of x."""
    module = ir.Module()
    w = Writer(module, "map", [POINTER, POINTER, I64])
    source, target, n = w.arguments
    w.loop(integer(0), n, lambda i: w.put(write(w, w.floats(source, i)), target, i), step=LANES)
    w.ret_void()
    code = machine_code.MachineCode(module)
    y, function = np.empty_like(x), ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    function(code.address("map"))(x.ctypes.data, y.ctypes.data, len(x))
    return y


def floats():
    """Return finite floats of every size and sign, with denormal ones, and infinities and NaN."""
    bits = np.linspace(0, 2**32 - 1, 2**20).astype(np.uint32)
    small = np.linspace(-110, 95, 2**18).astype(np.float32)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 88.72284, 88.7228394, -87.33655, -103.97, -104.0, 1e-45, -1e-45]
    return np.concatenate([bits.view(np.float32), small, np.array(special + [0.0] * 4, np.float32)])


def test_the_exponential_has_the_right_bits_but_one_or_two():
    x = floats()
    got = mapped(exponential, x)
    with np.errstate(all="ignore"):
        exact = np.exp(x.astype(np.float64))
    assert (np.isnan(got) == np.isnan(x)).all()
    finite = exact <= np.finfo(np.float32).max
    assert (got[np.isfinite(x) & ~finite] == np.inf).all()
    ulp = np.spacing(np.maximum(exact[finite], 2.0**-126).astype(np.float32)).astype(np.float64)
    assert (np.abs(got[finite] - exact[finite]) <= 2 * ulp).all()
    assert got[x == -np.inf].max() == 0
    assert got[x == np.inf].min() == np.inf


@pytest.mark.parametrize("activation", Activation)
def test_activations_of_all_floats(activation):
    x = floats()
    name = activation.name.lower()
    function = {"identity": torch.clone, "relu": torch.relu}.get(name) or getattr(torch.nn.functional, name)
    got, exact = mapped(lambda w, v: activated(w, v, activation), x), function(torch.from_numpy(x).double()).numpy()
    assert (np.isnan(got) == np.isnan(function(torch.from_numpy(x)).numpy())).all()
    if activation in (Activation.IDENTITY, Activation.RELU, Activation.RELU6):
        assert (got[~np.isnan(x)] == exact[~np.isnan(x)]).all()
    some = np.isfinite(x) & (np.abs(x) < 1e30)
    # Where exp(-x) is infinite, the SiLU is 0 instead of a number near 1e-37.
    assert (np.abs(got[some] - exact[some]) <= 6 * EPS * np.abs(exact[some]) + 1e-36).all()


@pytest.mark.parametrize("shape", list(itertools.product([1, 15, 16, 17, 40], repeat=2)))
def test_a_transposed_matrix(shape):
    module = ir.Module()
    transpose = write_transpose(module)
    transpose.linkage = "external"
    code = machine_code.MachineCode(module)
    rows, columns = shape
    x, y = np.random.default_rng(0).random((rows, columns + 3)), np.zeros((columns, rows + 2), np.float32)
    x = x.astype(np.float32)
    kinds = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, *[ctypes.c_int64] * 3]
    function = ctypes.CFUNCTYPE(None, *kinds)(code.address("transpose"))
    function(x.ctypes.data, columns + 3, y.ctypes.data, rows + 2, rows, columns)
    assert (y[:, :rows] == x[:, :columns].T).all()
    assert (y[:, rows:] == 0).all()


def processors():
    """Return processors whose code runs here, with their features."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {}
    found = {"x86-64": ""}
    if binding.get_host_cpu_features().get("avx2"):
        found["haswell"] = "+avx2,+fma"
    return found


@pytest.mark.parametrize("cpu", processors())
def test_code_for_smaller_processors_computes_the_same(cpu, monkeypatch):
    machine = machine_code.machine_for(cpu, processors()[cpu])
    monkeypatch.setattr(machine_code, "machine_for", lambda *_: machine)
    monkeypatch.setattr(kernel, "_process", kernel._Process())
    torch.manual_seed(0)
    for layer, shape in LAYERS.values():
        for rows in rows_of(pruned(layer, 0.6)):
            assert_computes(layer, torch.randn(shape), rows=rows, activation="silu" if rows == 1 else "relu6")


def modules():
    """Return one module of each kind."""
    for activation in Activation:
        yield from (Worker("product", False, activation, rows).module() for rows in (1, 4))
        yield from (Tile(rows, 2, activation, residual).module() for rows in (1, 4) for residual in (False, True))
    yield Tile(0, 4, Activation.IDENTITY, False).module()
    yield from (Worker(kind, threads).module() for kind in ("convolution", "tokens") for threads in (False, True))


@pytest.mark.parametrize(
    "triple", ["aarch64-unknown-linux-gnu", "arm64-apple-darwin", "x86_64-pc-windows-msvc", "x86_64-apple-darwin"]
)
def test_the_code_compiles_for_other_systems(triple):
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    try:
        target = binding.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip("this llvmlite has no code generator for it")
    machine = target.create_target_machine(opt=2, jit=True)
    for module in modules():
        module.triple = machine.triple
        compiled = binding.parse_assembly(str(module))
        compiled.verify()
        assert machine.emit_object(compiled)


def test_the_code_keeps_its_module_alive():
    address = kernel.tile(1, 4, Activation.RELU, False)
    assert address == kernel.tile(1, 4, Activation.RELU, False)
    assert address != kernel.tile(1, 3, Activation.RELU, False)

"""Sparse inference computes what dense inference does, where it wins, and refuses the rest at the door."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import feather_param
from feather_param import to_sparse_inference
from feather_param.inference import convert as inference
from feather_param.inference import kernel as sparse_kernel
from feather_param.inference import layers as sparse_layers
from feather_param.inference.convert import InferenceReport, InferenceRow
from feather_param.inference.layers import SparseLayer

WAYS = ("csr", "kernel")


def pruned(layer, rate=0.8):
    """Return the layer with a fraction of zeros in every weight."""
    for module in layer.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            generator = torch.Generator().manual_seed(0)
            module.weight.data[torch.rand(module.weight.shape, generator=generator) < rate] = 0
    return layer.eval()


def assert_computes_the_same(sparse, layer, x):
    """Compare with float64. A sum of n products and a bias, in any order, is off by at most n + 1 roundings of each."""
    twin, size = copy.deepcopy(layer).double(), copy.deepcopy(layer).double()
    for parameter in size.parameters():
        parameter.data.abs_()
    with torch.no_grad():
        expected = twin(x.double())
        terms = size(x.double().abs())  # exact: padding modes only move elements
        got = sparse(x)
    n = int(layer.weight.count_nonzero(dim=tuple(range(1, layer.weight.dim()))).max())
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    assert got.is_contiguous()
    assert ((got - expected).abs() <= (n + 1) * torch.finfo(torch.float32).eps * terms).all()


LAYERS = {
    "linear": (nn.Linear(20, 7), (3, 20)),
    "linear, one vector": (nn.Linear(20, 7), (20,)),
    "linear, batch 1": (nn.Linear(20, 7), (1, 20)),
    "linear, batch 0": (nn.Linear(20, 7), (0, 20)),
    "linear, no bias": (nn.Linear(20, 7, bias=False), (40, 20)),
    "linear, leading dimensions": (nn.Linear(20, 7), (2, 3, 5, 20)),
    "linear, more columns than a block": (nn.Linear(20, 7), (1100, 20)),
    "conv1d": (nn.Conv1d(6, 8, 3), (2, 6, 11)),
    "conv1d, causal dilation": (nn.Conv1d(6, 8, 3, padding=8, dilation=4), (2, 6, 11)),
    "conv2d": (nn.Conv2d(6, 8, 3), (2, 6, 9, 7)),
    "conv2d, 1x1": (nn.Conv2d(6, 8, 1), (1, 6, 9, 7)),
    "conv2d, 1x1, batch": (nn.Conv2d(6, 8, 1, bias=False), (3, 6, 9, 7)),
    "conv2d, 1x1, stride 2": (nn.Conv2d(6, 8, 1, stride=2), (2, 6, 9, 7)),
    "conv2d, 1x1, padding": (nn.Conv2d(6, 8, 1, padding=2), (1, 6, 9, 7)),
    "conv2d, ResNet's first": (nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), (1, 3, 40, 42)),
    "conv2d, stride beyond the window": (nn.Conv2d(6, 8, 2, stride=3, padding=1), (2, 6, 9, 7)),
    "conv2d, unequal in both directions": (nn.Conv2d(6, 8, (3, 2), (1, 2), (2, 0), (2, 1)), (2, 6, 9, 7)),
    "conv2d, padding larger than the image": (nn.Conv2d(6, 8, 3, padding=5), (1, 6, 2, 1)),
    "conv2d, same": (nn.Conv2d(6, 8, 4, padding="same", dilation=2), (2, 6, 9, 7)),
    "conv2d, groups": (nn.Conv2d(6, 8, 3, padding=1, groups=2), (2, 6, 9, 7)),
    "conv2d, depthwise": (nn.Conv2d(6, 12, 3, padding=1, stride=2, groups=6), (2, 6, 9, 7)),
    "conv2d, reflect": (nn.Conv2d(6, 8, 3, padding=2, padding_mode="reflect"), (2, 6, 9, 7)),
    "conv2d, replicate": (nn.Conv2d(6, 8, 3, padding=1, stride=2, padding_mode="replicate"), (2, 6, 9, 7)),
    "conv2d, circular": (nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 9, 7)),
    "conv2d, no batch": (nn.Conv2d(6, 8, 3, padding=1), (6, 9, 7)),
    "conv2d, batch 0": (nn.Conv2d(6, 8, 3, padding=1), (0, 6, 9, 7)),
    "conv3d": (nn.Conv3d(4, 6, 3, padding=1, stride=(1, 2, 2)), (2, 4, 5, 6, 7)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_sparse_layer_computes_what_the_dense_one_does(name, way):
    layer, shape = LAYERS[name]
    sparse = SparseLayer(pruned(layer))
    sparse.way = way
    assert_computes_the_same(sparse, layer, torch.randn(shape))


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_any_geometry_of_a_convolution(way, data):
    dims = data.draw(st.integers(1, 2))
    numbers = lambda low, high: data.draw(st.tuples(*[st.integers(low, high)] * dims))  # noqa: E731
    kernel, stride, padding, dilation = numbers(1, 4), numbers(1, 4), numbers(0, 4), numbers(1, 3)
    groups = data.draw(st.sampled_from([1, 2, 4]))
    smallest = (max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True))
    sizes = (low + more for low, more in zip(smallest, numbers(0, 6), strict=True))
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    layer = pruned(kind(4, 8, kernel, stride, padding, dilation, groups), rate=0.5)
    sparse = SparseLayer(layer)
    sparse.way = way
    with mock.patch.object(sparse_layers, "_COPIED", data.draw(st.sampled_from([1, 500, 10**6]))):  # parts of a batch
        assert_computes_the_same(sparse, layer, torch.randn(data.draw(st.integers(1, 5)), 4, *sizes))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_no_zeros_and_nothing_but_zeros(way, rate):
    layer = pruned(nn.Conv2d(4, 5, 3), rate)
    sparse = SparseLayer(layer)
    sparse.way = way
    assert_computes_the_same(sparse, layer, torch.randn(1, 4, 6, 6))


@pytest.mark.parametrize("way", WAYS)
def test_any_memory_format(way):
    layer = pruned(nn.Conv2d(4, 5, 3, stride=2, padding=1))
    sparse = SparseLayer(layer)
    sparse.way = way
    x = torch.randn(2, 4, 12, 10)
    for view in (
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3),
        x[:, :, ::2, 1:],
        x[:1].expand(3, 4, 12, 10),
    ):
        assert_computes_the_same(sparse, layer, view)
    linear = pruned(nn.Linear(4, 5))
    sparse = SparseLayer(linear)
    sparse.way = way
    assert_computes_the_same(sparse, linear, x.transpose(1, 3))


@pytest.mark.parametrize("way", WAYS)
def test_sizes_may_change_from_call_to_call(way):
    layer = pruned(nn.Conv2d(4, 5, 3, padding=1))
    sparse = SparseLayer(layer)
    sparse.way = way
    for shape in ((1, 4, 8, 8), (2, 4, 8, 8), (1, 4, 5, 9), (1, 4, 8, 8)):
        assert_computes_the_same(sparse, layer, torch.randn(shape))


@pytest.mark.parametrize("way", WAYS)
def test_several_threads_may_call_it(way):
    layer = pruned(nn.Conv2d(4, 5, 3, padding=1))
    sparse = SparseLayer(layer)
    sparse.way = way
    inputs = [torch.randn(1, 4, n, n) for n in range(4, 20)] * 10
    expected = [sparse(x) for x in inputs]
    with ThreadPoolExecutor(4) as threads:
        assert all(map(torch.equal, threads.map(sparse, inputs), expected))


@pytest.mark.parametrize("way", WAYS)
def test_what_is_infinite_reaches_only_those_who_look(way):
    layer = nn.Linear(3, 2)
    layer.weight.data = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    sparse = SparseLayer(layer)
    sparse.way = way
    x = torch.tensor([[1.0, float("inf"), float("nan")]])
    assert torch.equal(sparse(x).isfinite(), torch.tensor([[True, False]]))


def test_the_compiled_sum_is_the_plain_one():
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((5, 11)).astype(np.float32) * (rng.random((5, 11)) < 0.6)
    crow = np.append(0, (dense != 0).sum(1).cumsum()).astype(np.int32)
    col = np.nonzero(dense)[1].astype(np.int32)
    starts = rng.integers(0, 30, 11)
    x, bias = rng.standard_normal(60).astype(np.float32), rng.standard_normal(5).astype(np.float32)
    plain, fast = np.zeros((5, 30), np.float32), np.zeros((5, 30), np.float32)
    arguments = (crow, col, dense[dense != 0], starts, x, bias)
    sparse_kernel.sum_of_slices(*arguments, plain, 27)
    compiled = sparse_kernel.compiled()
    assert compiled is not None
    compiled(*arguments, fast, 27)
    slices = np.stack([x[start : start + 27] for start in starts])
    bound = 13 * np.finfo(np.float32).eps * (np.abs(dense) @ np.abs(slices) + np.abs(bias)[:, None])
    for out in (plain, fast):
        assert (np.abs(out[:, :27] - (dense.astype(np.float64) @ slices + bias[:, None])) <= bound).all()
        assert (out[:, 27:] == 0).all()


@pytest.fixture
def without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    sparse_kernel.compiled.cache_clear()
    yield
    sparse_kernel.compiled.cache_clear()


@pytest.mark.usefixtures("without_numba")
def test_without_numba_the_other_way_is_taken(clock):
    assert sparse_kernel.compiled() is None
    layer = pruned(nn.Conv2d(4, 5, 3, padding=1))
    sparse = SparseLayer(layer)
    sparse.way = "kernel"
    assert_computes_the_same(sparse, layer, torch.randn(1, 4, 6, 6))
    model = pruned(nn.Linear(1024, 1024), 0.99)
    fast, report = to_sparse_inference(model, torch.randn(1, 1024))
    assert isinstance(fast, SparseLayer)
    assert report.rows[0].way == "csr"
    assert report.notes == ("without numba (feather_param[inference]): convolutions gain less",)
    assert str(report).endswith(report.notes[0])


@pytest.fixture
def clock(monkeypatch):
    """Return seconds that are to be measured for "dense", "csr" and "kernel" layers and the "sparse" whole."""
    times = {"dense": 1.0, "csr": 0.5, "kernel": 0.5, "sparse": 0.5}

    def seconds(ways, budget):
        for way in ways.values():
            way()
        return {name: [times[name]] * 3 for name in ways}

    monkeypatch.setattr(inference, "_seconds", seconds)
    return times


def network():
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 4))
    return pruned(nn.Sequential(*body))


X = torch.randn(2, 3, 6, 6)


@pytest.mark.parametrize(
    ("csr", "kernel", "way"), [(0.89, 2.0, "csr"), (2.0, 0.89, "kernel"), (0.5, 0.6, "csr"), (0.6, 0.5, "kernel")]
)
def test_what_clearly_wins_is_taken(clock, csr, kernel, way):
    clock.update(csr=csr, kernel=kernel, sparse=0.94)
    fast, report = to_sparse_inference(network(), X)
    assert [row.way for row in report.rows] == [way, way]
    assert [row.sparse_ms for row in report.rows] == [1000 * min(csr, kernel)] * 2
    assert (fast[0].way, fast[4].way) == (way, way)
    assert report.swapped == ("0", "4")
    assert (report.dense_ms, report.sparse_ms) == (1000.0, 940.0)


def test_what_does_not_clearly_win_stays_dense(clock):
    clock.update(csr=0.91, kernel=0.95)
    fast, report = to_sparse_inference(network(), X)
    assert [type(layer) for layer in fast] == [type(layer) for layer in network()]
    assert report.swapped == ()
    assert report.dense_ms == report.sparse_ms
    assert report.dense_mb == report.sparse_mb
    assert str(report).count("no gain") == 3


def test_a_network_that_became_no_faster_stays_dense(clock):
    clock.update(sparse=0.96)
    fast, report = to_sparse_inference(network(), X)
    assert [type(layer) for layer in fast] == [type(layer) for layer in network()]
    assert [row.reason for row in report.rows] == ["the network as a whole became no faster"] * 2
    assert report.swapped == ()
    assert report.sparse_ms == report.dense_ms


def test_all_calls_of_a_layer_count(clock):
    layer = nn.Linear(6, 6)
    fast, report = to_sparse_inference(pruned(nn.Sequential(layer, nn.ReLU(), layer)), torch.randn(3, 6))
    assert [(row.name, row.dense_ms) for row in report.rows] == [("0", 2000.0)]
    assert fast[0] is fast[2]
    assert isinstance(fast[0], SparseLayer)


def test_timing_takes_turns_and_keeps_its_budget(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(inference.time, "perf_counter", lambda: now[0])
    order = []

    def way(name, seconds):
        def call():
            order.append(name)
            now[0] += seconds

        return call

    measured = inference._seconds({"dense": way("a", 2.0), "csr": way("b", 1.0)}, budget=0.1)
    assert measured == {"dense": [2.0] * 5, "csr": [1.0] * 5}
    assert order == ["a", "b"] * 6
    assert len(inference._seconds({"dense": way("a", 0.5), "csr": way("b", 0.5)}, budget=8.0)["dense"]) == 8
    assert len(inference._seconds({"dense": way("a", 1e-3)}, budget=8.0)["dense"]) == 50


def test_a_real_gain_is_found():
    torch.manual_seed(0)
    model = pruned(nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2048)), 0.99)
    x = torch.randn(1, 2048)
    fast, report = to_sparse_inference(model, x)
    assert report.swapped == ("0", "2")
    assert report.sparse_ms < report.dense_ms
    assert report.sparse_mb < 0.05 * report.dense_mb
    assert report.threads == torch.get_num_threads() == 1
    with torch.inference_mode():
        assert torch.allclose(fast(x), model(x), rtol=0, atol=1e-4)


def test_the_given_model_is_left_alone(clock):
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast, _ = to_sparse_inference(model, X)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [type(layer) for layer in model] == [type(layer) for layer in network()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all("forward" not in vars(module) for module in [*model.modules(), *fast.modules()])
    fast[0].bias.zero_()
    assert torch.equal(model[0].bias, before["0.bias"])


def test_any_place_in_the_model(clock):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.ModuleList([nn.Linear(6, 6)])})
            self.unused = nn.Linear(6, 6)

        def forward(self, x, scale):
            return scale * self.layers["b"][0](input=self.layers["a"](x))

    model, x = pruned(Net()), torch.randn(3, 6)
    fast, report = to_sparse_inference(model, (x, 2.0))
    assert report.swapped == ("layers.a", "layers.b.0")
    assert {row.name: row.reason for row in report.rows if row.reason} == {"unused": "its forward was not called"}
    assert torch.allclose(fast(x, 2.0), model(x, 2.0), atol=1e-5)
    root, report = to_sparse_inference(pruned(nn.Linear(6, 6)), x)
    assert isinstance(root, SparseLayer)
    assert report.swapped == ("",)


def test_torchs_transformer_keeps_its_fast_path(clock):
    model = pruned(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    x = torch.randn(2, 5, 16)
    fast, _ = to_sparse_inference(model, x)
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)


class Halved(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


def hooked():
    layer = nn.Linear(6, 6)
    layer.register_forward_hook(lambda module, arguments, output: output)
    return layer


REASONS = {
    "half": (lambda: nn.Linear(6, 6).half(), r"its weight is float16 on cpu; call model\.float\(\)"),
    "meta": (lambda: nn.Linear(6, 6, device="meta"), "its weight is float32 on meta"),
    "subclass": (lambda: Halved(6, 6), "its forward is not torch's own"),
    "hook": (hooked, "it has hooks"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), "its weight is parametrized"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_cannot_be_swapped_is_named(name):
    build, reason = REASONS[name]
    with pytest.raises(ValueError, match=rf"got none; 0: {reason}$"):
        to_sparse_inference(nn.Sequential(build()).eval(), torch.randn(1, 6))


@pytest.mark.parametrize("name", ["subclass", "hook", "parametrized"])
def test_what_cannot_be_swapped_stays_beside_what_can(name, clock):
    build, reason = REASONS[name]
    model = nn.Sequential(pruned(nn.Linear(6, 6)), build(), nn.Linear(6, 6)).eval()
    x = torch.randn(2, 6)
    fast, report = to_sparse_inference(model, x)
    assert [row.way == "dense" for row in report.rows] == [False, True, True]
    assert [row.reason for row in report.rows] == ["", reason, "fewer than half of its weights are zero"]
    assert f"dense: 1 ({reason})" in str(report)
    assert torch.allclose(fast(x), model(x), atol=1e-5)


def sparsified_model():
    model = nn.Linear(6, 6)
    feather_param.sparsify(model, final_rate=0.5, total_steps=1)
    return model.eval()


LINEAR = nn.Linear(6, 6).eval()
REFUSED = {
    "no module": (dict, X, TypeError, "expected model to be an nn.Module that is not scripted, got dict"),
    "example of another type": (lambda: LINEAR, [X], TypeError, "expected example_input to be a tensor or a tuple"),
    "sparsified": (sparsified_model, X, ValueError, r"still sparsified; call desparsify\(model\) first"),
    "training": (lambda: nn.Linear(6, 6), X, ValueError, r"got the model in training mode; call model.eval\(\) first"),
    "partly training": (lambda: nn.Sequential(LINEAR).eval().append(nn.Dropout()), X, ValueError, "got 1 in training"),
    "compiled": (lambda: torch.compile(LINEAR), X, ValueError, "pass the one that torch.compile was given"),
    "lazy": (lambda: nn.LazyLinear(6).eval(), X, ValueError, "got a lazy one; call it once first"),
    "no layer": (lambda: nn.ReLU().eval(), X, ValueError, "expected a Linear or Conv layer in float32 on the CPU, got"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    build, example, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        to_sparse_inference(build(), example)


def test_a_call_that_fails_fails_as_the_models_own():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        to_sparse_inference(pruned(nn.Sequential(nn.Linear(6, 6))), torch.randn(2, 5))


WRONG_INPUTS = {
    "dtype": (torch.zeros(1, 4, 6, 6).double(), TypeError, r"got input of torch\.float64 on cpu; use the dense model"),
    "device": (torch.zeros(1, 4, 6, 6).to("meta"), TypeError, r"got input of torch\.float32 on meta"),
    "gradient": (torch.zeros(1, 4, 6, 6).requires_grad_(), RuntimeError, "expected an input without gradient"),
    "channels": (
        torch.zeros(1, 3, 6, 6),
        ValueError,
        r"expected 4 input channels, got a tensor of shape \(1, 3, 6, 6\)",
    ),
    "dimensions": (torch.zeros(1, 1, 4, 6, 6), ValueError, "expected 4 input channels"),
    "too few dimensions": (torch.zeros(4, 6), ValueError, "expected 4 input channels"),
    "small": (torch.zeros(1, 4, 2, 6), ValueError, r"at least the window's size \(3, 3\), got \(2, 6\)"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_inputs_that_are_refused(name, way):
    x, error, message = WRONG_INPUTS[name]
    sparse = SparseLayer(pruned(nn.Conv2d(4, 5, 3)))
    sparse.way = way
    with pytest.raises(error, match=message):
        sparse(x)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_cast_to_another_dtype_is_refused(way):
    sparse = SparseLayer(pruned(nn.Linear(6, 6)))
    sparse.way = way
    x = torch.randn(2, 6)
    before = sparse(x)
    with pytest.raises(TypeError, match=r"got weight of torch\.float16 on cpu"):
        sparse.half()(x)
    assert not torch.equal(sparse.float()(x), before)  # it is the rounded weights that are computed with
    assert torch.allclose(sparse(x), before, atol=1e-2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.jit, by version
def test_a_trace_is_refused():
    sparse = SparseLayer(pruned(nn.Linear(6, 6)))
    with pytest.raises(RuntimeError, match="expected to compute, got traced"):
        torch.jit.trace(sparse, torch.randn(2, 6))


@pytest.mark.parametrize("way", WAYS)
def test_inference_mode_autocast_and_compile(way, clock):
    clock[way] = 0.1
    model = network()
    fast, _ = to_sparse_inference(model, X)
    expected = model(X).detach()
    assert fast[0].way == way
    assert not fast(X).requires_grad
    with torch.inference_mode():
        assert torch.allclose(fast(X), expected, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(fast(X), expected, atol=1e-5)
        assert fast(X.bfloat16()).dtype == torch.float32
    compiled = torch.compile(fast, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(X), expected, atol=1e-5)


def test_copies_and_files(clock):
    fast, _ = to_sparse_inference(network(), X)
    expected = fast(X)
    buffer = io.BytesIO()
    torch.save(fast.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert [name for name in state if name.startswith("0.")] == ["0.crow", "0.col", "0.values", "0.bias"]
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        with torch.inference_mode():
            assert torch.equal(twin(X), expected)
        assert torch.equal(twin(X), expected)
        twin[0].values.zero_()
        twin.load_state_dict(state)
        assert torch.equal(twin(X), expected)
    assert torch.equal(fast(X), expected)


def test_the_report_reads_like_a_table():
    rows = (
        InferenceRow("conv", (8, 4, 3, 3), 0.9912, "kernel", 2.0, 0.1, 1.16, 0.02),
        InferenceRow("fc1", (8, 4), 0.95, "dense", 0.01, 0.02, 0.13, 0.013),
        InferenceRow("fc2", (8, 4), 0.2, "dense", None, None, 0.13, None, "fewer than half of its weights are zero"),
    )
    report = InferenceReport(rows, 4.0, 2.0, 1.5, 0.3, threads=2, notes=("a note",))
    assert str(report).splitlines() == [
        "layer  shape    zeros     way  dense ms  sparse ms     gain  dense MB  sparse MB",
        "conv   8x4x3x3  99.1%  kernel     2.000      0.100    20.0x      1.16       0.02",
        "fc1    8x4      95.0%   dense     0.010      0.020  no gain      0.13       0.01",
        "fc2    8x4      20.0%   dense         -          -  no gain      0.13          -",
        "all                               4.000      2.000     2.0x      1.50       0.30",
        "dense: fc2 (fewer than half of its weights are zero)",
        "float32, CPU threads: 2",
        "a note",
    ]
    assert report.swapped == ("conv",)


def test_a_layer_that_is_the_model_has_a_name_in_the_table():
    row = InferenceRow("", (8, 4), 0.2, "dense", None, None, 0.13, None, "too few zeros")
    lines = str(InferenceReport((row,), 1.0, 1.0, 0.2, 0.2, threads=1)).splitlines()
    assert lines[1].startswith("(the model)  8x4")
    assert "dense: (the model) (too few zeros)" in lines


def test_it_shows_its_layers():
    assert repr(SparseLayer(pruned(nn.Linear(6, 4), 1.0))) == "SparseLayer(6, 4, nonzeros=0, way='csr')"
    assert repr(SparseLayer(pruned(nn.Conv1d(6, 4, 3), 1.0))) == "SparseLayer(6, 4, window=(3,), nonzeros=0, way='csr')"

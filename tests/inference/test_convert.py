"""`to_sparse_inference` swaps the layers that are faster, and refuses other models."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import feather_param
from feather_param import to_sparse_inference
from feather_param.inference.layers import SparseLayer
from tests.inference.pruned import METHODS, X, network, pruned


@pytest.mark.usefixtures("without_numba")
def test_without_numba_the_method_is_csr(clock):
    fast, report = to_sparse_inference(pruned(nn.Linear(1024, 1024), 0.99), torch.randn(1, 1024))
    assert isinstance(fast, SparseLayer)
    assert report.rows[0].method == "csr"
    assert report.notes == ("without numba (feather_param[inference]): convolutions gain less",)
    assert str(report).endswith(report.notes[0])


@pytest.mark.parametrize(
    ("csr", "kernel", "method"), [(0.89, 2.0, "csr"), (2.0, 0.89, "kernel"), (0.5, 0.6, "csr"), (0.6, 0.5, "kernel")]
)
def test_a_clearly_faster_method_is_taken(clock, csr, kernel, method):
    clock.update(csr=csr, kernel=kernel, sparse=0.94)
    fast, report = to_sparse_inference(network(), X)
    assert [row.method for row in report.rows] == [method, method]
    assert [row.sparse_ms for row in report.rows] == [1000 * min(csr, kernel)] * 2
    assert (fast[0].method, fast[4].method) == (method, method)
    assert report.swapped == ("0", "4")
    assert (report.dense_ms, report.sparse_ms) == (1000.0, 940.0)


def test_a_layer_that_is_not_clearly_faster_stays_dense(clock):
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


def test_the_given_model_is_unchanged(clock):
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast, _ = to_sparse_inference(model, X)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [type(layer) for layer in model] == [type(layer) for layer in network()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all("forward" not in vars(module) for module in [*model.modules(), *fast.modules()])
    fast[0].bias.zero_()
    assert torch.equal(model[0].bias, before["0.bias"])


def test_layers_are_swapped_anywhere_in_the_model(clock):
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
def test_the_error_names_a_layer_that_cannot_be_swapped(name):
    build, reason = REASONS[name]
    with pytest.raises(ValueError, match=rf"got none; 0: {reason}$"):
        to_sparse_inference(nn.Sequential(build()).eval(), torch.randn(1, 6))


@pytest.mark.parametrize("name", ["subclass", "hook", "parametrized"])
def test_a_layer_that_cannot_be_swapped_stays_dense(name, clock):
    build, reason = REASONS[name]
    model = nn.Sequential(pruned(nn.Linear(6, 6)), build(), nn.Linear(6, 6)).eval()
    x = torch.randn(2, 6)
    fast, report = to_sparse_inference(model, x)
    assert [row.method == "dense" for row in report.rows] == [False, True, True]
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
    "compiled": (lambda: torch.compile(LINEAR), X, ValueError, "pass the model that you gave to torch.compile"),
    "lazy": (lambda: nn.LazyLinear(6).eval(), X, ValueError, "got a lazy one; call it once first"),
    "no layer": (lambda: nn.ReLU().eval(), X, ValueError, "expected a Linear or Conv layer in float32 on the CPU, got"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_and_inputs_are_refused(name):
    build, example, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        to_sparse_inference(build(), example)


def test_an_error_of_the_model_is_raised():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        to_sparse_inference(pruned(nn.Sequential(nn.Linear(6, 6))), torch.randn(2, 5))


@pytest.mark.parametrize("method", METHODS)
def test_inference_mode_autocast_and_compile(method, clock):
    clock[method] = 0.1
    model = network()
    fast, _ = to_sparse_inference(model, X)
    expected = model(X).detach()
    assert fast[0].method == method
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

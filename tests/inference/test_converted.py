"""A converted model computes what the model computes, however it is called, copied and stored."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from feather_param import to_sparse_inference
from tests.inference.pruned import NETWORKS, X, names_of, network, pruned


@pytest.mark.parametrize("size", [1, 5])
def test_inputs_of_other_sizes(size, clock):
    torch.manual_seed(0)
    model = pruned(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    fast, report = to_sparse_inference(model, X)
    assert report.swapped == ("0", "3")
    x = torch.randn(size, 3, 7, 12)
    assert torch.allclose(fast(x), model(x), atol=1e-5)


@dataclass
class Outputs:
    scores: Any
    more: Any = None


class Cache:
    def __init__(self, *tensors):
        self.tensors = tensors


class Plain:
    __slots__ = ()


class Forms(nn.Module):
    """A model whose outputs have a form that `form` makes of a tensor."""

    def __init__(self, form):
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.form = form

    def forward(self, x):
        return self.form(self.fc(x))


FORMS = {
    "ordered": (lambda y: OrderedDict(a=y, b=[y + 1]), lambda out: (out["a"], out["b"][0])),
    "dataclass": (lambda y: Outputs(y, Outputs(y + 1)), lambda out: (out.scores, out.more.scores)),
    "object": (lambda y: (y, Cache(y + 1), Plain()), lambda out: (out[0], *out[1].tensors)),
    "float": (lambda y: (y, y.sum().item()), lambda out: (out[0], torch.tensor(out[1]))),
    "array": (lambda y: y.numpy(), lambda out: (torch.from_numpy(out),)),
}


@pytest.mark.parametrize("name", FORMS)
def test_outputs_of_any_form(name, clock):
    form, tensors = FORMS[name]
    model, x = pruned(Forms(form)), torch.randn(2, 6)
    fast, report = to_sparse_inference(model, x)
    assert report.swapped == ("fc",)
    with torch.no_grad():
        output, expected = fast(x), model(x)
    assert type(output) is type(expected)
    for got, wanted in zip(tensors(output), tensors(expected), strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)


def test_an_ordered_dict_is_traced(clock):
    fast, report = to_sparse_inference(pruned(Forms(FORMS["ordered"][0])), torch.randn(2, 6))
    assert report.notes == ()
    assert type(pickle.loads(pickle.dumps(fast))(torch.randn(2, 6))) is OrderedDict


def test_other_tensors_in_an_object_are_found(clock):
    numbers = itertools.count()
    model = pruned(Forms(lambda y: Cache(y + next(numbers))))
    _, report = to_sparse_inference(model, torch.randn(2, 6))
    assert report.swapped == ()
    assert "no layer is sparse: the network with sparse layers gives other outputs" in report.notes


def test_the_copy_is_in_eval_mode(clock):
    model = pruned(nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)))
    fast, report = to_sparse_inference(model, X)
    assert report.swapped == ("0", "1")
    assert not any(module.training for module in fast.modules())


def test_a_model_that_keeps_computed_tensors(clock):
    model: Any = pruned(Forms(lambda y: y))
    model.kept = [model(torch.randn(1, 6))]
    model.fc.again = 2 * model.fc.weight
    x = torch.randn(2, 6)
    fast, report = to_sparse_inference(model, x)
    assert report.swapped == ("fc",)
    assert torch.allclose(fast(x), model(x), atol=1e-5)
    assert model.kept[0].requires_grad


def test_a_model_is_converted_in_inference_mode(clock):
    with torch.inference_mode():
        model = network()
        fast, report = to_sparse_inference(model, X)
        assert report.notes == ()
    assert not any(tensor.is_inference() for tensor in (*fast.parameters(), *fast.buffers()))
    with torch.no_grad():
        assert torch.allclose(fast(X), model(X), atol=1e-5)
        assert torch.allclose(copy.deepcopy(fast)(X), model(X), atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_inference_mode_and_gradients(name, clock):
    clock.update(NETWORKS[name])
    model = network()
    fast, _ = to_sparse_inference(model, X)
    expected = model(X).detach()
    assert not fast(X).requires_grad
    with torch.inference_mode():
        assert torch.allclose(fast(X), expected, atol=1e-5)
    if name == "sparse":
        with pytest.raises(RuntimeError, match="expected an input without gradient"):
            fast(X.clone().requires_grad_())


def test_autocast(clock):
    model = network()
    fast, _ = to_sparse_inference(model, X)
    expected = model(X).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(fast(X), expected, atol=1e-5)
        assert fast(X.bfloat16()).dtype == torch.float32


def test_compiled_models(clock):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            x = x + 1
            return torch.sigmoid(self.b(self.a(x).relu() * 2) + x)

    model = pruned(Residual())
    fast, _ = to_sparse_inference(model, X)
    assert names_of(fast) == ["a", "b"]
    graphs = []

    def backend(graph, _):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    with torch.no_grad():
        compiled = torch.compile(fast, backend=backend)
        for size in (2, 3, 4, 1, 5, 2):
            x = torch.randn(size, 3, 6, 6)
            assert torch.allclose(compiled(x), model(x), atol=1e-5)
    operations = {str(target) for graph in graphs for target in graph}
    assert graphs
    assert not any("data_ptr" in each or "empty" in each for each in operations)  # nothing of the sparse layers


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_trace_is_refused(clock):
    fast, _ = to_sparse_inference(network(), X)
    with torch.no_grad(), pytest.raises(RuntimeError, match="expected a call that is not traced"):
        torch.jit.trace(fast, X)


def test_a_model_cast_to_half_is_refused(clock):
    fast, _ = to_sparse_inference(network(), X)
    with pytest.raises(
        TypeError, match=r"expected input and weight in float32 on the CPU, got weight of torch\.float16"
    ):
        fast.half()(X)


def test_copies_and_files(clock):
    fast, _ = to_sparse_inference(network(), X)
    expected = fast(X)
    buffer = io.BytesIO()
    torch.save(fast.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert [key for key in state if key.startswith("0.")] == ["0.block_start", "0.columns", "0.values", "0.bias"]
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        with torch.inference_mode():
            assert torch.equal(twin(X), expected)
        twin.get_submodule("0").values.zero_()
        assert not torch.equal(twin(X), expected)
        twin.load_state_dict(state)
        assert torch.equal(twin(X), expected)
    assert torch.equal(fast(X), expected)

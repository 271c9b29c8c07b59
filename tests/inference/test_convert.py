"""`to_sparse_inference` fuses a model, swaps the layers that are faster, and refuses other models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from feather_param import to_sparse_inference
from feather_param.inference.fusing.fuse import FusedLayer
from feather_param.inference.layers import SparseLayer
from tests.inference.pruned import NETWORKS, X, names_of, network, pruned


def test_a_clearly_faster_layer_is_swapped(clock):
    clock.update(sparse=0.84)
    fast, report = to_sparse_inference(network(), X)
    assert [row.method for row in report.rows] == ["sparse", "sparse"]
    assert [row.sparse_ms for row in report.rows] == [840.0] * 2
    assert names_of(fast) == ["0", "4"]
    assert report.swapped == ("0", "4")
    assert (report.dense_ms, report.sparse_ms) == (1000.0, 840.0)
    assert report.choices.network == "sparse"


@pytest.mark.parametrize(("fused", "network_name"), [(0.94, "fused"), (0.96, "dense")])
def test_a_layer_that_is_not_clearly_faster_stays_dense(clock, fused, network_name):
    clock.update(sparse=0.91, fused=fused)
    fast, report = to_sparse_inference(network(), X)
    assert report.choices.network == network_name
    assert report.choices.sparse == report.swapped == ()
    assert names_of(fast, FusedLayer) == (["0", "4"] if network_name == "fused" else [])
    assert [row.reason for row in report.rows] == ["the dense layer is as fast"] * 2
    assert (report.dense_ms, report.sparse_ms) == (1000.0, 1000 * fused if network_name == "fused" else 1000.0)
    assert str(report).count("no gain") == (2 if network_name == "fused" else 3)


@pytest.mark.parametrize("fused", [0.9, 1.0])
def test_a_network_that_became_no_faster_stays_dense(clock, fused, monkeypatch):
    clock.update(sparse=0.87, fused=fused)
    if fused == 1.0:
        monkeypatch.setattr("feather_param.inference.convert._MAX_FRACTION", 0.8)
    fast, report = to_sparse_inference(network(), X)
    assert names_of(fast) == []
    assert [row.reason for row in report.rows] == ["the network as a whole became no faster"] * 2
    assert report.swapped == ()
    assert report.choices.network == ("dense" if fused == 1.0 else "fused")
    assert [row.sparse_ms for row in report.rows] == [870.0] * 2


def test_all_calls_of_a_layer_count(clock):
    layer = nn.Linear(6, 6)
    fast, report = to_sparse_inference(pruned(nn.Sequential(layer, nn.ReLU(), layer)), torch.randn(3, 6))
    assert [(row.name, row.dense_ms) for row in report.rows] == [("0", 2000.0)]
    assert names_of(fast) == ["0"]


def test_a_real_gain_is_found():
    torch.manual_seed(0)
    model = pruned(nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2048)), 0.99)
    x = torch.randn(1, 2048)
    fast, report = to_sparse_inference(model, x)
    assert report.swapped == ("0", "2")
    assert report.sparse_ms < report.dense_ms
    assert report.sparse_mb < 0.05 * report.dense_mb
    assert report.threads == torch.get_num_threads()
    with torch.inference_mode():
        assert torch.allclose(fast(x), model(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_given_model_is_unchanged_and_shares_nothing(name, clock):
    clock.update(NETWORKS[name])
    model = network()
    model[0].extra = [1, 2]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    attributes = {key: dict(vars(module)) for key, module in model.named_modules()}
    fast, report = to_sparse_inference(model, X)
    assert report.choices.network == name
    assert {key: dict(vars(module)) for key, module in model.named_modules()} == attributes
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all("forward" not in vars(module) for module in [*model.modules(), *fast.modules()])
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    expected, dense = fast(X), model(X)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    assert torch.equal(fast(X), expected)
    model.load_state_dict(before)
    for tensor in (*fast.parameters(), *fast.buffers()):
        tensor.data.zero_()
    assert torch.equal(model(X), dense)
    memory = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert memory.isdisjoint(t.untyped_storage().data_ptr() for t in (*fast.parameters(), *fast.buffers()))


class Counting(nn.Module):
    """A model whose forward changes it."""

    def __init__(self):
        super().__init__()
        self.a = pruned(nn.Linear(6, 6))
        self.register_buffer("calls", torch.zeros(()))
        self.steps = 0
        self.eval()

    def forward(self, x):
        self.calls += 1
        self.steps += 1
        return self.a(x)


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_a_model_that_its_forward_changes_is_not_called(name, clock):
    clock.update(NETWORKS[name])
    model = Counting()
    fast, report = to_sparse_inference(model, torch.randn(2, 6))
    assert report.choices.network == name
    assert (int(model.calls), model.steps) == (0, 0)
    assert (int(fast.calls), fast.steps) == (0, 0)
    fast(torch.randn(2, 6))
    assert (int(model.calls), int(fast.calls)) == (0, 1)


def test_the_example_is_unchanged(clock):
    x = torch.randn(2, 6)
    before = x.clone()
    to_sparse_inference(pruned(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6))), x)
    assert torch.equal(x, before)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.ModuleList([nn.Linear(6, 6)])})
        self.unused = nn.Linear(6, 6)

    def forward(self, x, scale, y=None):
        x = scale * self.layers["b"][0](input=self.layers["a"](x))
        return x if y is None else (x, y + x)


def test_layers_are_swapped_anywhere_in_the_model(clock):
    model, x = pruned(Net()), torch.randn(3, 6)
    fast, report = to_sparse_inference(model, (x, torch.tensor(2.0)))
    assert report.swapped == ("layers.a", "layers.b.0")
    assert [row.name for row in report.rows] == ["layers.a", "layers.b.0", "unused"]
    assert {row.name: row.reason for row in report.rows if row.reason} == {"unused": "its forward was not called"}
    assert torch.allclose(fast(x, torch.tensor(2.0)), model(x, 2.0), atol=1e-5)


def test_a_model_that_is_one_layer(clock):
    model, x = pruned(nn.Linear(6, 6)), torch.randn(3, 6)
    fast, report = to_sparse_inference(model, x)
    assert isinstance(fast, SparseLayer)
    assert report.swapped == ("",)
    assert report.notes == ("not fused: the model is a single layer",)
    assert torch.allclose(fast(x), model(x), atol=1e-5)


def test_several_inputs(clock):
    model, x, y = pruned(Net()), torch.randn(3, 6), torch.randn(3, 6)
    fast, _ = to_sparse_inference(model, (x, torch.tensor(2.0), y))
    for n in (3, 5):
        x, y = torch.randn(n, 6), torch.randn(n, 6)
        for got, expected in zip(fast(x, torch.tensor(2.0), y), model(x, 2.0, y), strict=True):
            assert torch.allclose(got, expected, atol=1e-5)


def test_a_model_that_cannot_be_traced_keeps_its_code(clock):
    class Branching(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    model, x = pruned(Branching(nn.Linear(6, 6), nn.BatchNorm1d(6))), torch.randn(3, 6)
    fast, report = to_sparse_inference(model, x)
    assert type(fast) is Branching
    assert report.swapped == ("0",)
    assert report.notes[0].startswith("not fused: it cannot be traced: symbolically traced variables cannot be used")
    assert str(report).endswith(report.notes[0])
    for each in (x, -x):
        assert torch.allclose(fast(each), model(each), atol=1e-5)


def test_tied_and_repeated_layers(clock):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight
            self.again = self.first
            self.embedding = nn.Embedding(6, 6)
            self.head = nn.Linear(6, 6, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.second(self.first(self.again(x)).relu())) + self.embedding.weight[0]

    for branching in (False, True):
        model, x = pruned(Tied()), torch.randn(3, 6)
        if branching:
            model.register_forward_hook(lambda *_: None)  # it is not traced
        fast, report = to_sparse_inference(model, x)
        assert report.swapped == ("first", "second", "head")
        assert torch.allclose(fast(x), model(x), atol=1e-5)
        if branching:
            assert fast.again is fast.first
            assert report.notes == ("not fused: the model has hooks",)
        before = fast(x)
        model.embedding.weight.data.zero_()
        assert torch.equal(fast(x), before)


@pytest.mark.parametrize("traced", [True, False])
def test_a_layer_whose_weight_other_code_reads_stays_right(traced, clock):
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return torch.cat([self.b(x), nn.functional.linear(self.a(x), self.a.weight.t().contiguous())])

    model, x = pruned(Reading()), torch.randn(3, 6)
    if not traced:
        model.register_forward_hook(lambda *_: None)
    fast, report = to_sparse_inference(model, x)
    assert torch.allclose(fast(x), model(x), atol=1e-5)
    if traced:
        assert report.swapped == ("b",)
        assert [row.reason for row in report.rows] == ["other code reads its weight", ""]
    else:
        assert report.swapped == ()
        assert report.notes[-1].startswith("no layer is sparse: the network with sparse layers ")
        assert report.notes[-1] == f"no layer is sparse: {report.rows[0].reason}"


def test_a_layer_that_fails_sparse_stays_dense(clock):
    class Energy(nn.Sequential):
        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(super().forward(x).sum(), x)[0]

    model, x = pruned(Energy(nn.Linear(6, 6), nn.Tanh())), torch.randn(3, 6)
    fast, report = to_sparse_inference(model, x)
    assert report.rows[0].reason.startswith("the sparse layer fails: expected an input without gradient")
    assert torch.equal(fast(x), model(x))


def test_torchs_transformer_keeps_its_fast_path(clock):
    model = pruned(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    x = torch.randn(2, 5, 16)
    fast, report = to_sparse_inference(model, x)
    assert {row.reason for row in report.rows} == {"its forward was not called"}
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)


def test_layers_that_are_not_linear_or_convolutions_stay(clock):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 6, batch_first=True)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.up = nn.ConvTranspose1d(3, 4, 2)
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            x = self.lstm(x)[0]
            x = self.attention(x, x, x)[0]
            return self.up(self.fc(x))

    model, x = pruned(Mixed()), torch.randn(2, 3, 6)
    fast, report = to_sparse_inference(model, x)
    assert report.swapped == ("fc",)
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)
    for name in ("lstm", "attention", "up"):
        assert type(fast.get_submodule(name)) is type(model.get_submodule(name))

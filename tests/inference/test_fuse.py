"""`fused` folds and joins what is exact and safe, and nothing else."""

from __future__ import annotations

import copy
import operator
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.inference.graphs import ROWS, Net, X, agree, bn, conv, fused_layers, graph_of, measured_norms, seq, summary


def net(forward, **children):
    return Net(forward, **children)


# name: model, input, and what the layers become: norms left, additions, activations
FUSED = {
    "conv, norm, relu": (seq(conv(), bn(), nn.ReLU()), X, (0, 0, "relu")),
    "conv without bias, norm": (seq(conv(bias=False), bn()), X, (0, 0, "identity")),
    "norm that is not affine": (seq(conv(), bn(affine=False)), X, (0, 0, "identity")),
    "two norms": (seq(conv(), bn(), bn()), X, (0, 0, "identity")),
    "norm with another eps": (seq(conv(), bn(eps=0.5)), X, (0, 0, "identity")),
    "linear, norm, relu": (seq(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()), ROWS, (0, 0, "relu")),
    "conv1d": (seq(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.SiLU()), X[..., 0], (0, 0, "silu")),
    "conv3d": (seq(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6)), torch.randn(2, 4, 5, 4, 3), (0, 0, "identity")),
    "groups, stride": (seq(nn.Conv2d(4, 8, 3, 2, groups=4), nn.BatchNorm2d(8), nn.ReLU6()), X, (0, 0, "relu6")),
    "padding='same'": (seq(nn.Conv2d(4, 8, 3, padding="same"), nn.BatchNorm2d(8)), X, (0, 0, "identity")),
    "circular": (seq(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), bn()), X, (0, 0, "identity")),
    "dropout and identity": (seq(conv(), nn.Dropout(), bn(), nn.Identity(), nn.ReLU(True)), X, (0, 0, "relu")),
    "F.dropout": (net(lambda m, x: F.relu(F.dropout(m.a(x), 0.5, m.training)), a=conv()), X, (0, 0, "relu")),
    "subclass with torch's forward": (
        seq(type("C", (nn.Conv2d,), {})(4, 4, 1), type("B", (nn.BatchNorm2d,), {})(4)),
        X,
        (0, 0, "identity"),
    ),
    "synchronized norm": (seq(conv(), nn.SyncBatchNorm(4)), X, (0, 0, "identity")),
    "F.batch_norm": (
        net(
            lambda m, x: F.batch_norm(m.a(x), m.b.running_mean, m.b.running_var, m.b.weight, m.b.bias, eps=m.b.eps),
            a=conv(),
            b=bn(),
        ),
        X,
        (0, 0, "identity"),
    ),
    "input=": (net(lambda m, x: m.b(input=m.a(input=x)), a=conv(), b=bn()), X, (0, 0, "identity")),
    "residual": (net(lambda m, x: F.relu(m.b(m.a(x)) + x), a=conv(), b=bn()), X, (0, 1, "relu")),
    "a norm shared by two": (net(lambda m, x: m.n(m.a(x)) * m.n(m.b(x)), a=conv(), b=conv(), n=bn()), X, (0, 0)),
    "both operands are layers": (net(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv()), X, (0, 1)),
    # what stays
    "norm first": (seq(bn(), conv(), nn.ReLU()), X, (1, 0, "relu")),
    "norm without statistics": (seq(conv(), bn(track_running_stats=False)), X, (1, 0)),
    "instance norm": (seq(conv(), nn.InstanceNorm2d(4, affine=True)), X, (0, 0)),
    "norm after the addition": (net(lambda m, x: m.b(m.a(x) + x), a=conv(), b=bn()), X, (1, 1)),
    "norm after the activation": (seq(conv(), nn.ReLU(), bn()), X, (1, 0, "relu")),
    "relu of another": (net(lambda m, x: m.a(x) * F.relu(x), a=conv()), X, (0, 0)),
    "output read twice": (net(lambda m, x: m.b(m.a(x)) + m.a.bias.sum(), a=conv(), b=bn()), X, None),
    "read beside the norm": (net(lambda m, x: (y := m.a(x)).sum() + m.b(y), a=conv(), b=bn()), X, (1, 0)),
    "returned beside the norm": (net(lambda m, x: (y := m.a(x), m.b(y)), a=conv(), b=bn()), X, (1, 0)),
    "a layer called twice": (net(lambda m, x: m.b(m.a(F.relu(m.a(x)))), a=conv(), b=bn()), X, (1, 0)),
    "added to itself": (net(lambda m, x: (y := m.a(x)) + y, a=conv()), X, (0, 0)),
    "a number added": (net(lambda m, x: F.relu(m.a(x) + 1), a=conv()), X, (0, 0)),
    "alpha": (net(lambda m, x: torch.add(m.a(x), x, alpha=2), a=conv()), X, (0, 0)),
    "broadcast": (net(lambda m, x: m.a(x) + x.mean((2, 3), keepdim=True), a=conv()), X, (0, 0)),
    "broadcast to more": (net(lambda m, x: m.a(x) + x[None], a=conv()), X, (0, 0)),
    "another dtype": (net(lambda m, x: m.a(x) + x.double(), a=conv()), X, (0, 0)),
    "tanh gelu": (seq(conv(), nn.GELU("tanh")), X, (0, 0)),
    "F.gelu of tanh": (net(lambda m, x: F.gelu(m.a(x), approximate="tanh"), a=conv()), X, (0, 0)),
    "leaky relu": (seq(conv(), nn.LeakyReLU()), X, (0, 0)),
    "rows of matrices, norm": (seq(nn.Linear(6, 6), nn.BatchNorm1d(4)), X[..., 0], (1, 0)),
    "infinite scale": (seq(conv(), bn(eps=1e-80)), X, (1, 0)),  # torch 2.11 refuses 0
}


@pytest.mark.parametrize("name", FUSED)
def test_what_is_joined(name):
    model, x, expected = FUSED[name]
    model = measured_norms(model)
    if name == "infinite scale":
        model[1].running_var[0] = 0.0
    graph = agree(model, x)
    if expected is None:
        assert not fused_layers(graph)
    else:
        assert summary(graph)[: len(expected)] == expected


@pytest.mark.parametrize(
    ("activation", "apply"),
    [
        *[("relu", a) for a in (F.relu, torch.relu, torch.relu_, F.relu_)],
        ("relu", lambda x: F.relu(x, True)),
        ("relu", lambda x: F.relu(input=x, inplace=True)),
        *[("relu", a) for a in (nn.ReLU(), nn.ReLU(True), lambda x: x.relu(), lambda x: x.relu_())],
        *[("relu6", a) for a in (F.relu6, nn.ReLU6(), nn.ReLU6(True), lambda x: F.relu6(x, inplace=True))],
        *[("silu", a) for a in (F.silu, nn.SiLU(), nn.SiLU(True), lambda x: F.silu(x, inplace=True))],
        *[("hardswish", a) for a in (F.hardswish, nn.Hardswish(), nn.Hardswish(True))],
        *[("gelu", a) for a in (F.gelu, nn.GELU(), lambda x: F.gelu(x, approximate="none"))],
    ],
)
def test_activations(activation, apply):
    model = measured_norms(net(lambda m, x: m.act(m.b(m.a(x))), a=conv(), b=bn(), act=apply))
    assert summary(agree(model, 4 * X)) == (0, 0, activation)


@pytest.mark.parametrize(
    ("add", "additions"),
    [
        (operator.add, 1),
        (lambda y, x: x + y, 1),
        (torch.add, 1),
        (lambda y, x: torch.add(x, y), 1),
        (lambda y, x: torch.add(y, x, alpha=1), 1),
        (lambda y, x: y.add(x), 1),
        (lambda y, x: x.add(y), 1),
        (operator.iadd, 1),
        (lambda y, x: y.add_(x), 1),
        (lambda y, x: operator.iadd(x, y), 0),  # these change x
        (lambda y, x: x.add_(y), 0),
        (lambda y, x: torch.add(y, other=x), 0),
        (lambda y, x: y - x, 0),
    ],
)
def test_additions(add, additions):
    def forward(model, x):
        x = x * 2
        y = add(model.a(x), x)
        return F.relu(y), x

    assert summary(agree(net(forward, a=conv()), X))[1] == additions


def inplace_input(m, x):
    x = x + 1
    y = m.a(x)
    x.mul_(2)
    return y + x


def inplace_view(m, x):
    x = x + 1
    y, view = m.a(x), x[0]
    view += 3
    return y + x


def inplace_alias(m, x):
    x = x + 1
    same = x
    y = m.a(x)
    x += 3
    return y + same


def inplace_module(m, x):
    x = x - 1
    y = m.a(x)
    m.act(x)
    return y + x


def inplace_result(m, x):
    y = m.a(x)
    z = y.view(-1)
    F.relu_(y)
    return z


def inplace_norm_input(m, x):
    y = m.a(x)
    z = m.b(y)
    y.add_(1)
    return z * y


def inplace_between(m, x):
    x = x + 1
    y = m.a(x)
    x += 1
    return F.relu(m.b(y)), x


def inplace_residual_later(m, x):
    x = x + 1
    y = F.relu_(m.a(x) + x)
    x += 5
    return y * x


def inplace_elsewhere(m, x):
    other = x * 2
    y = m.a(x)
    other.relu_()
    return y + other


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (inplace_input, (0, 0, "identity")),
        (inplace_view, (0, 0, "identity")),
        (inplace_alias, (0, 0, "identity")),
        (inplace_module, (0, 0, "identity")),
        (inplace_result, (0, 0, "identity")),
        (inplace_norm_input, (1, 0, "identity")),
        (inplace_between, (0, 0, "relu")),
        (inplace_residual_later, (0, 1, "relu")),
        (inplace_elsewhere, (0, 0, "identity")),
    ],
)
def test_changes_in_place(forward, expected):
    model = measured_norms(net(forward, a=conv(), b=bn(), act=nn.ReLU(True)))
    assert summary(agree(model, X)) == expected


@pytest.mark.parametrize(("add", "taker"), [(operator.add, "c"), (operator.iadd, "a")])
def test_the_later_of_two_layers_takes_the_addition_if_it_can(add, taker):
    model = net(lambda m, x: F.relu(add(m.b(m.a(x)), m.d(m.c(x)))), a=conv(), b=bn(), c=conv(), d=bn())
    graph = agree(measured_norms(model), X)
    assert summary(graph)[:2] == (0, 1)
    assert [name for name, layer in fused_layers(graph).items() if layer.activation == "relu"] == [taker]


@pytest.mark.parametrize("size", [(1, 4, 1, 1), (3, 4, 9, 2)])
def test_broadcasting_may_begin_at_other_sizes(size):
    model = net(lambda m, x: m.a(x) + x.mean((2, 3), keepdim=True), a=nn.Conv2d(4, 4, 1)).eval()
    graph = graph_of(model, torch.randn(2, 4, 1, 1))
    assert summary(graph) == (0, 1, "identity")
    x = torch.randn(size)
    with torch.no_grad():
        assert torch.allclose(graph(x), model(x), atol=1e-6)


def test_tied_weights_stay_those_of_the_other_layer():
    model = net(lambda m, x: m.n(m.a(x)) + m.b(x), a=conv(), b=conv(), n=bn())
    model.b.weight = model.a.weight
    graph = agree(measured_norms(model), X)
    layers = fused_layers(graph)
    assert layers["b"].layer.weight is model.a.weight
    assert layers["a"].layer.weight is not model.a.weight


@pytest.mark.parametrize(
    ("forward", "kept"),
    [
        (lambda m, x: m.a(x) + F.conv2d(x, m.a.weight, padding=1), "a"),
        (lambda m, x: m.a(x) * m.a.bias.sum(), "a"),
        (lambda m, x: m.a(x) + m.hooked(x), "a"),
    ],
)
def test_a_layer_that_something_else_reads_stays(forward, kept):
    inner = nn.Sequential(conv(), nn.ReLU())
    inner.register_forward_hook(lambda *_: None)
    model = net(forward, a=inner[0], hooked=inner).eval()
    graph = agree(model, X)
    assert not fused_layers(graph)
    assert type(graph.get_submodule(kept)) is nn.Conv2d


def unfit(layer):
    """Return ways to make a layer one that must be left alone."""
    hooked, own, other = copy.deepcopy(layer), copy.deepcopy(layer), copy.deepcopy(layer)
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    own.forward = types.MethodType(lambda self, x: 3 * F.conv2d(x, self.weight), own)
    return [hooked, own, nn.utils.parametrizations.weight_norm(other)]


@pytest.mark.parametrize("layer", unfit(conv()))
def test_layers_that_cannot_be_replaced_stay(layer):
    graph = agree(measured_norms(seq(layer, bn(), nn.ReLU(), conv())), X)
    assert [*fused_layers(graph)] == ["3"]
    assert summary(graph)[0] == 1


@pytest.mark.parametrize("position", [1, 2, 3])
def test_hooks_are_kept(position):
    calls = []
    model = measured_norms(seq(conv(), bn(), nn.Identity(), nn.ReLU(), seq(conv())))
    model[position].register_forward_hook(lambda module, args, output: calls.append(type(module)) or output + 1)
    model[4].register_forward_pre_hook(lambda module, args: calls.append(type(module)))
    graph = agree(model, X)
    calls.clear()
    graph(X)
    assert calls == [type(model[position]), nn.Sequential]
    assert type(graph.get_submodule("4.0")) is nn.Conv2d


def test_a_module_with_two_names_has_the_first():
    layer = conv()
    graph = agree(net(lambda m, x: m.b(x), a=layer, b=layer), X)
    assert [*fused_layers(graph)] == ["a"]


def test_torchs_own_blocks_stay_whole():
    model = net(
        lambda m, x: m.encoder(m.a(x)) + m.attention(x, x, x)[0],
        a=nn.Linear(8, 8),
        encoder=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
    )
    graph = agree(model.eval(), torch.randn(2, 3, 8))
    assert [*fused_layers(graph)] == ["a"]
    assert type(graph.get_submodule("encoder.linear1")) is nn.Linear
    assert type(graph.get_submodule("encoder")) is nn.TransformerEncoderLayer


def test_the_result_is_a_module_like_others():
    model = measured_norms(net(lambda m, x: F.relu(m.b(m.a(x)) + m.c(x)), a=conv(), b=bn(), c=conv()))
    graph = graph_of(model, X)
    with torch.no_grad():
        expected = graph(X)
        for twin in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph)), graph.train(), graph.eval()):
            assert torch.equal(twin(X), expected)
            assert [*fused_layers(twin)] == ["a", "c"]
    assert graph.load_state_dict(graph.state_dict())
    assert "activation='relu'" in repr(graph)
    assert all(len(node.args) in (1, 2) and not node.kwargs for node in graph.graph.find_nodes(op="call_module"))


def test_the_model_is_unchanged():
    model = measured_norms(seq(conv(), bn(), nn.ReLU()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, x = [*model.modules()], X.clone()
    graph_of(model, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [*model.modules()] == modules
    assert torch.equal(x, X)

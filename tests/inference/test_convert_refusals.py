"""Layers that stay dense, and models that are refused, with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import feather_param
from feather_param import to_sparse_inference
from tests.inference.pruned import X, network, pruned


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
    model = nn.Sequential(pruned(nn.Linear(6, 6)), build()).eval()
    x = torch.randn(2, 6)
    fast, report = to_sparse_inference(model, x)
    assert [(row.method, row.reason) for row in report.rows] == [("sparse", ""), ("dense", reason)]
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


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llvmlite.binding", None)
    with pytest.raises(ImportError, match=r"feather_param\[inference\]"):
        to_sparse_inference(network(), X)

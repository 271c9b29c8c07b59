"""Each snippet of docs/exports.md keeps the outputs, and the file has the right number of zeros."""

from __future__ import annotations

import copy
import functools
import re
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import feather_param
from archs import resnet20
from feather_param.inference.batchnorm import recalibrate_batchnorm
from tests import twins

RATE = 0.8
PAGE = (Path(__file__).parent.parent / "docs" / "exports.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"^## ([^\n]+)\n\n```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))

# Warnings of torch about its own code. Their category depends on the version of torch; torch 2.6 does not warn of
# TorchScript and torch.ao.quantization.
WARNINGS = [
    r".*torch\.jit\.\w+` is (deprecated|not supported):DeprecationWarning",
    r".*torch\.jit\.\w+` is (deprecated|not supported):FutureWarning",
    "torch.ao.quantization is deprecated:DeprecationWarning",
    "torch.quantize_per_tensor, .* are deprecated:UserWarning",
    "Please use quant_min and quant_max:UserWarning",
    "Converting a tensor to a Python boolean:torch.jit.TracerWarning",  # in attention
    "Skipping serialization of skipfiles_inline:UserWarning",  # AOTInductor of torch 2.6
    r"`isinstance\(treespec, LeafSpec\)`:FutureWarning",  # torch.export of torch 2.13
]
pytestmark = [pytest.mark.filterwarnings(f"ignore:{warning}") for warning in WARNINGS]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (16,)),
    "encoder": (encoder, (5, 16)),
    "resnet20": (lambda: resnet20(num_classes=10, in_channels=1), (1, 8, 8)),
}


@functools.cache
def baked(kind: str) -> tuple[nn.Module, Tensor, int, int]:
    """Return a baked model with every matrix pruned, an input, its number of zeros, and its number of weights."""
    build, shape = MODELS[kind]
    torch.manual_seed(0)
    model = build()
    for parameter in model.parameters():  # no equal layers, and no bias that is zero
        nn.init.normal_(parameter, std=0.2)
    include = ["*", "*.in_proj_weight"] if kind == "encoder" else None
    controller = feather_param.sparsify(model, final_rate=RATE, total_steps=1, include=include)
    total = controller.report().total
    controller.desparsify()
    x = torch.randn(32, *shape)
    if kind == "resnet20":
        recalibrate_batchnorm(model, [x])
    return model.eval(), x, round(RATE * total), total


def matrices(tensors: Iterable[Any]) -> list[Tensor]:
    return [tensor for tensor in map(torch.as_tensor, tensors) if tensor.dim() >= 2]


def initializers(path: str) -> list[Tensor]:
    """Return the weights of an ONNX file; the zero point is subtracted from quantised ones."""
    import onnx

    arrays = {part.name: onnx.numpy_helper.to_array(part) for part in onnx.load(path).graph.initializer}
    points = {name: array for name, array in arrays.items() if name.endswith("_zero_point")}
    return [
        torch.tensor(array).int() - int(points[name.replace("_quantized", "_zero_point")])
        if name.endswith("_quantized")
        else torch.tensor(array)
        for name, array in arrays.items()
    ]


def packaged(path: str, model: nn.Module) -> list[Tensor]:
    """Return those weights of the model that a package contains byte for byte."""
    with zipfile.ZipFile(path) as package:
        content = b"".join(package.read(name) for name in package.namelist())
    return [weight for weight in model.state_dict().values() if weight.numpy().tobytes() in content]


def quantised(model: nn.Module) -> list[Tensor]:
    own = [module.weight().dequantize() for module in model.modules() if callable(getattr(module, "weight", None))]
    return own + [parameter.detach() for parameter in model.parameters()]


def safetensors(path: str) -> Iterable[Tensor]:
    from safetensors.torch import load_file

    return load_file(path).values()


# The weights after each snippet: those in its file, or those of the model that it made if it writes no file.
WEIGHTS: dict[str, Callable[[dict[str, Any]], Iterable[Any]]] = {
    "torch.save": lambda scope: torch.load("model.pt", weights_only=True).values(),
    "safetensors": lambda scope: safetensors("model.safetensors"),
    "torch.export": lambda scope: [tensor.detach() for tensor in torch.export.load("model.pt2").state_dict.values()],
    "ONNX": lambda scope: initializers("model.onnx"),
    "AOTInductor": lambda scope: packaged("compiled.pt2", scope["model"]),
    "torch.jit.script": lambda scope: torch.jit.load("model.ts").state_dict().values(),
    "torch.jit.trace": lambda scope: torch.jit.load("model.ts").state_dict().values(),
    "int8, ONNX Runtime": lambda scope: initializers("int8.onnx"),
    "int8, torch, dynamic": lambda scope: quantised(scope["quantised"]),
    "int8, torch, static": lambda scope: quantised(scope["quantised"]),
}
NEEDS = {"ONNX": "onnx onnxscript onnxruntime", "int8, torch": "torch.ao.quantization", "safetensors": "safetensors"}


def skip_if_requirements_are_missing(to: str, kind: str) -> None:
    for name, libraries in NEEDS.items():
        for library in libraries.split() if name in to else ():
            pytest.importorskip(library)
    if to == "AOTInductor" and not shutil.which("g++"):
        pytest.skip("needs g++")
    if torch.__version__.startswith("2.6.") and (to == "int8, ONNX Runtime" or (to, kind) == ("ONNX", "resnet20")):
        pytest.skip(
            "torch 2.6 cannot export BatchNorm to ONNX, nor any model, dense or sparse, that ONNX Runtime can quantise"
        )
    if to == "int8, torch, static" and "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("needs the int8 kernels for x86")


def cases() -> list[tuple[str, str]]:
    chosen = []
    for to in SNIPPETS:
        for kind in MODELS:
            if to == "AOTInductor" and kind != "mlp":
                continue  # the others would take minutes
            if (to, kind) == ("int8, ONNX Runtime", "resnet20"):
                continue  # it has a single Linear layer, the MLP has more
            if (to, kind) == ("int8, torch, static", "encoder"):
                continue  # torch.fx cannot trace it, dense or sparse
            chosen.append((to, kind))
    return chosen


def test_every_snippet_is_tested():
    assert list(SNIPPETS) == list(WEIGHTS)


@pytest.mark.parametrize(("to", "kind"), cases())
def test_a_snippet_keeps_outputs_and_zeros(to, kind, tmp_path, monkeypatch, request):
    skip_if_requirements_are_missing(to, kind)
    monkeypatch.chdir(tmp_path)
    model, x, zeros, total = baked(kind)
    scope = {"torch": torch, "model": copy.deepcopy(model), "x": x, "build": MODELS[kind][0]}
    if kind == "encoder" and to in ("torch.jit.trace", "int8, torch, dynamic"):  # as the page says
        torch.backends.mha.set_fastpath_enabled(False)
        request.addfinalizer(lambda: torch.backends.mha.set_fastpath_enabled(True))
    with torch.no_grad():
        expected = model(x)
        exec(compile(SNIPPETS[to], to, "exec"), scope)
    y = torch.as_tensor(scope["y"])
    weights = matrices(WEIGHTS[to](scope))
    assert sum(weight.numel() for weight in weights) == total
    if "int8" in to:
        # 8 bits cause about 1 % of noise in each layer. That of 20 layers adds up to 5 %, and twice that is allowed.
        assert (y - expected).norm() < 0.1 * expected.norm()
        assert twins.count_zeros(weights) >= zeros  # small weights round to zero
    else:
        torch.testing.assert_close(y, expected)
        assert twins.count_zeros(weights) == zeros
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    if kind == "resnet20" and files and "int8" not in to:
        assert 4 * total <= sum(map(len, files)) < 1.2 * 4 * total
        assert sum(len(zlib.compress(content)) for content in files) < 0.4 * 4 * total


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_int8_of_torch_keeps_each_zero(per):
    quantization = pytest.importorskip("torch.ao.quantization")
    model = baked("mlp")[0]
    config = {"tensor": quantization.default_dynamic_qconfig, "channel": quantization.per_channel_dynamic_qconfig}
    small = quantization.quantize_dynamic(model, {nn.Linear: config[per]}, dtype=torch.qint8)
    for layer, other in zip(model, small, strict=True):
        if isinstance(layer, nn.Linear):
            weight = other.weight()
            assert ("channel" in str(weight.qscheme())) == (per == "channel")
            values = weight.dequantize()
            assert (values[layer.weight == 0] == 0).all()
            assert torch.allclose(values, layer.weight, rtol=0.0, atol=layer.weight.abs().max().item() / 127)


@pytest.mark.skipif(not hasattr(torch.jit, "script"), reason="this torch has no TorchScript")
def test_torchscript_is_deprecated_as_the_page_says():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.jit.script(nn.Linear(2, 2))
    if caught or tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):  # older versions do not warn
        assert any("deprecated" in str(warning.message) for warning in caught)


def test_exports_of_a_sparsified_model_carry_dense_weights():
    """This is why the page says: call desparsify first."""
    model = mlp()
    feather_param.sparsify(model, final_rate=RATE, total_steps=1)
    program = torch.export.export(model, (torch.zeros(2, 16),), strict=False)
    assert twins.count_zeros(matrices(t.detach() for t in program.state_dict.values())) == 0
    with pytest.raises((RuntimeError, ValueError)):
        torch.jit.script(model)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_operator_has_no_operation_that_onnx_lacks(strict):
    class Product(nn.Module):
        def forward(self, x, weight):
            return x @ feather_param.parametrizations.feather_threshold(weight, torch.tensor(0.5))

    program = torch.export.export(Product(), (torch.zeros(2, 16), torch.ones(16, 16)), strict=strict)
    called = {node.target for node in program.run_decompositions().graph.nodes}
    assert torch.ops.aten.pow.Tensor_Scalar in called
    assert torch.ops.aten.view.dtype not in called  # reads the bits of numbers

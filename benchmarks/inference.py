"""Measure the inference of pruned networks, sparse and dense: `python -m benchmarks.inference`.

The methods alternate, on one thread unless `--threads` is given:

    dense          the network in torch
    sparse         the network of `to_sparse_inference`
    without numba  the same network if numba is not installed
    torch CSR      each Linear weight converted with `to_sparse_csr()`; torch has no convolution with a CSR weight
    ONNX Runtime   the exported dense network; the runtime folds batch norms into convolutions

The weights are random and pruned in one step by magnitude. One threshold is used for all layers; cases named "uniform"
have the same rate in each layer, to 0.1 %. `--checkpoint` measures trained weights of the network `--arch` instead, for
images of side `--size`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import tempfile
import unittest.mock
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import archs
import feather_param
from benchmarks import timing
from feather_param.inference import kernel, recalibrate_batchnorm

Case = tuple[nn.Module, Tensor]


def linear() -> nn.Module:
    """Return one Linear layer."""
    return nn.Linear(4096, 4096)


def mlp() -> nn.Module:
    """Return four Linear layers with ReLUs between them."""
    return nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(4096, 4096), nn.ReLU())][:-1])


def resnet50() -> nn.Module:
    """Return torchvision's ResNet-50."""
    from torchvision.models import resnet50 as build

    return build(weights=None)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (linear, (4096,)),
    "mlp": (mlp, (4096,)),
    "resnet50": (resnet50, (3, 224, 224)),
}
CASES = [  # network, rate, uniform, batch
    ("linear", 0.7, False, 1),
    ("linear", 0.7, False, 32),
    ("linear", 0.95, False, 1),
    ("linear", 0.95, False, 32),
    ("linear", 0.95, False, 256),
    ("mlp", 0.95, False, 1),
    ("mlp", 0.99, False, 1),
    ("mlp", 0.99, False, 32),
    ("resnet50", 0.8, False, 1),
    ("resnet50", 0.95, False, 1),
    ("resnet50", 0.95, True, 1),
    ("resnet50", 0.99, False, 1),
    ("resnet50", 0.95, True, 8),
]


def pruned(network: str, rate: float, uniform: bool, batch: int) -> Case:
    """Return a network of random weights with a fraction of zeros, and an input."""
    build, shape = NETWORKS[network]
    torch.manual_seed(0)
    model = build()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing survives")
        limit = rate + 0.001 if uniform else None  # the rounding in each layer needs some room
        feather_param.sparsify(model, final_rate=rate, total_steps=1, max_rate_per_layer=limit).step()
        feather_param.desparsify(model)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        recalibrate_batchnorm(
            model, [torch.randn(4, *shape)]
        )  # otherwise activations vanish, and subnormal numbers are slow
    return model.eval(), torch.randn(batch, *shape)


def trained(path: Path, arch: str, size: int, batch: int) -> Case:
    """Return a network of `archs` with the weights of a file, and an input."""
    state = feather_param.load_sparse(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    weights = [tensor for tensor in state.values() if tensor.dim() > 1]
    model = getattr(archs, arch)(num_classes=len(weights[-1]), in_channels=weights[0].shape[1])
    model.load_state_dict(state)
    torch.manual_seed(0)
    return model.eval(), torch.randn(batch, weights[0].shape[1], size, size)


def measure(model: nn.Module, x: Tensor, n: int, sessions: dict[Any, Callable[[], object]]) -> dict[str, Any]:
    """Return the seconds of each method and figures of the report. ONNX Runtime's sessions are reused."""
    fast, report = feather_param.to_sparse_inference(model, x)
    with unittest.mock.patch.object(kernel, "compiled", return_value=None):
        alone, _ = feather_param.to_sparse_inference(model, x)
    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: model(x),
        "sparse": lambda: fast(x),
        "without numba": lambda: alone(x),
    }
    missing = {}
    try:
        calls["torch CSR"] = with_csr_weights(model, x)
    except ValueError as error:
        missing["torch CSR"] = str(error)
    try:
        graph = (str(model), x.shape)  # its speed does not depend on the weights, and exporting takes long
        calls["ONNX Runtime"] = sessions[graph] = sessions.get(graph) or in_onnx_runtime(model, x)
    except ImportError as error:
        missing["ONNX Runtime"] = str(error)
    with torch.no_grad():  # torch CSR fails in inference mode
        dense = model(x)
        error = float((fast(x) - dense).abs().max() / dense.abs().max())
        seconds = timing.rounds(calls, n, warmup=2)
    return {
        "zeros": sum(row.rate * torch.Size(row.shape).numel() for row in report.rows)
        / sum(torch.Size(row.shape).numel() for row in report.rows),
        "seconds": timing.medians(seconds),
        "times dense": {name: timing.ratio(seconds, "dense", name) for name in calls if name != "dense"},
        "missing": missing,
        "layers swapped": f"{len(report.swapped)} of {len(report.rows)}",
        "dense MB": report.dense_mb,
        "sparse MB": report.sparse_mb,
        "largest difference over largest output": error,
    }


def with_csr_weights(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return the forward pass with torch's CSR tensors as Linear weights."""
    model = copy.deepcopy(model)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if len(layers) < len([layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]):
        raise ValueError("torch has no convolution with a CSR weight")
    for layer in layers:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr())
    return lambda: model(x)


def in_onnx_runtime(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return the forward pass of the dense network in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations in the exporter
        torch.onnx.export(model, (x,), f"{folder}/model.onnx", dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, help="networks with random weights; default: all")
    parser.add_argument("--checkpoint", nargs="+", type=Path, default=[], help="state_dicts, or files of save_sparse")
    parser.add_argument("--arch", choices=archs.__all__, default="resnet20", help="network of the checkpoints")
    parser.add_argument("--size", type=int, nargs="+", default=[32], help="sides of the checkpoints' images")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes for the checkpoints")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--suffix", default="", help="end of the results file's name")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    networks = arguments.networks or ([] if arguments.checkpoint else list(NETWORKS))
    cases: dict[str, Callable[[], Case]] = {}
    for network, rate, uniform, batch in CASES:
        if network in networks:
            name = f"{network}, {rate:.0%}{' uniform' if uniform else ''}, batch {batch}"
            cases[name] = lambda case=(network, rate, uniform, batch): pruned(*case)
    for path in arguments.checkpoint:
        for size, batch in itertools.product(arguments.size, arguments.batch):
            case = (path, arguments.arch, size, batch)
            cases[f"{arguments.arch} of {path.name}, {size} px, batch {batch}"] = lambda case=case: trained(*case)
    figures: dict[str, Any] = {}
    sessions: dict[Any, Callable[[], object]] = {}
    rows = []
    path = None
    for name in tqdm(cases, desc="networks"):
        figures[name] = row = measure(*cases[name](), arguments.rounds, sessions)
        times = [row["times dense"].get(method) for method in ("sparse", "without numba", "torch CSR", "ONNX Runtime")]
        cells = ["-" if value is None else f"{value:.2f}" for value in times]
        sizes = (f"{row['dense MB']:.1f}", f"{row['sparse MB']:.1f}")
        rows.append([name, f"{1e3 * row['seconds']['dense']:.2f}", *cells, row["layers swapped"], *sizes])
        path = timing.write("inference" + arguments.suffix, figures)  # keeps the results so far if a later case fails
    header = ["network", "dense ms", "sparse", "without numba", "torch CSR", "ONNX Runtime"]
    print(timing.show([*header, "layers swapped", "dense MB", "sparse MB"], rows))
    print(f"\ntimes as fast as dense; written to {path}")


if __name__ == "__main__":
    main()

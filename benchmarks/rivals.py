"""The ways to run a network on a CPU that `benchmarks.inference` compares, one function each.

All compute in float32 on the same number of threads. The runtimes read one ONNX file. It is exported with
``dynamo=False`` and operator set 14: DeepSparse computes all operators of such a file itself, and hands most networks
of the newer exporter to the ONNX Runtime that it contains. The other runtimes are as fast with either file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import feather_param
from benchmarks.timing import Elapsed

__all__ = ["METHODS", "Running", "Work", "absent", "versions"]

WORKER = Path(__file__).with_name("deepsparse_worker.py")


@dataclass(frozen=True)
class Work:
    """A network in eval mode, its input, and where and how to run it."""

    model: nn.Module
    x: Tensor
    threads: int
    folder: Path
    deepsparse: str = ""
    """The Python of the environment with DeepSparse."""

    @cached_property
    def onnx(self) -> str:
        """Return the path of the exported network."""
        path = str(self.folder / "model.onnx")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations in the exporter
            torch.onnx.export(self.model, (self.x,), path, dynamo=False, opset_version=14)
        return path


@dataclass(frozen=True)
class Running:
    """A network that is ready to run."""

    call: Callable[[], object]
    output: Tensor
    details: dict[str, Any] = field(default_factory=dict)
    close: Callable[[], object] = lambda: None


def dense(work: Work) -> Running:
    """Run the network in torch as it is."""
    return Running(lambda: work.model(work.x), work.model(work.x))


def compiled(work: Work) -> Running:
    """Run the network after `torch.compile`, with constant weights, so that batch norms are folded."""
    from torch._inductor import config

    # The cache of graphs does not know the number of threads.
    with config.patch(freezing=True, fx_graph_cache=False):
        fast = torch.compile(work.model, dynamic=False)
        output = fast(work.x)
    return Running(lambda: fast(work.x), output, close=torch.compiler.reset)


def onnx_runtime(work: Work) -> Running:
    """Run the dense network in ONNX Runtime with all its optimizations.

    Its threads may spin. Without spinning it was slower on two threads, and the methods after it were not faster.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = work.threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(work.onnx, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: work.x.numpy()}
    return Running(lambda: session.run(None, feed), torch.as_tensor(session.run(None, feed)[0]))


def openvino(work: Work) -> Running:
    """Run the dense network in OpenVINO. It would compute in bfloat16 by itself on some processors."""
    from openvino import Core  # pyright: ignore[reportMissingImports]

    settings = {
        "INFERENCE_NUM_THREADS": work.threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # all of them would wait for one core on a busy machine
    }
    request = Core().compile_model(work.onnx, "CPU", settings).create_infer_request()

    def call() -> Any:
        return request.infer([work.x.numpy()], share_inputs=True, share_outputs=True)

    return Running(call, torch.tensor(call()[0]))


def deepsparse(work: Work) -> Running:
    """Run the pruned network in DeepSparse, in a process that measures its own calls."""
    source, target, log = work.folder / "input.npy", work.folder / "output.npy", work.folder / "deepsparse.log"
    np.save(source, work.x.numpy())
    command = [work.deepsparse, "-I", WORKER, work.onnx, source, target, str(work.threads)]
    with log.open("w", encoding="utf-8") as file:
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=file, text=True)
    requests, replies = process.stdin, process.stdout
    assert requests is not None
    assert replies is not None

    def reply() -> dict[str, float]:
        line = replies.readline()
        if not line:
            said = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
            code = process.wait()
            close()
            raise RuntimeError(f"its process ended with code {code}: {said}")
        return json.loads(line)

    def call() -> Elapsed:
        requests.write("\n")
        requests.flush()
        return Elapsed(reply()["seconds"])

    def close() -> None:
        process.kill()
        process.wait()
        for file in (requests, replies):
            with contextlib.suppress(BrokenPipeError):
                file.close()

    details = reply()
    return Running(call, torch.from_numpy(np.load(target)), {"supported operators": details["supported"]}, close)


def ours(work: Work) -> Running:
    """Run the network of `to_sparse_inference`."""
    fast, report = feather_param.to_sparse_inference(work.model, work.x)
    details = {
        "layers swapped": f"{len(report.swapped)} of {len(report.rows)}",
        "dense MB": report.dense_mb,
        "sparse MB": report.sparse_mb,
    }
    return Running(lambda: fast(work.x), fast(work.x), details)


METHODS: dict[str, Callable[[Work], Running]] = {
    "dense": dense,
    "compiled": compiled,
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
    "DeepSparse": deepsparse,
    "ours": ours,
}
PACKAGES = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}


def absent(deepsparse: str) -> dict[str, str]:
    """Return the methods that this machine lacks, with the reason of each."""
    reasons = {
        method: f"not installed: pip install {package}"
        for method, package in PACKAGES.items()
        if importlib.util.find_spec(package) is None
    }
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        reasons["compiled"] = f"torch.compile needs a C++ compiler, and there is no {compiler}"
    if not deepsparse:
        reasons["DeepSparse"] = "--deepsparse does not give the Python of its environment"
    elif problem := _deepsparse_version(deepsparse)[1]:
        reasons["DeepSparse"] = problem
    return reasons


def versions(deepsparse: str) -> dict[str, str]:
    """Return the versions of the installed runtimes."""
    packages = [*PACKAGES.values(), "transformers"]
    found = {package: metadata.version(package) for package in packages if importlib.util.find_spec(package)}
    version = _deepsparse_version(deepsparse)[0] if deepsparse else ""
    return found | ({"deepsparse": version} if version else {})


def _deepsparse_version(python: str) -> tuple[str, str]:
    """Return the version of DeepSparse in an environment, and why it cannot be imported."""
    code = "import deepsparse; print(deepsparse.__version__)"
    environment = os.environ | {"NM_DISABLE_ANALYTICS": "1"}
    try:
        done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, env=environment)
    except OSError as error:
        return "", f"{python}: {error.strerror}"
    if done.returncode:
        return "", done.stderr.strip().rpartition("\n")[2]
    return done.stdout.strip().rpartition("\n")[2], ""

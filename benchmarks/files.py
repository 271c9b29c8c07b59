"""Measure sizes of checkpoint files, and the time to save and load them: `python -m benchmarks.files`.

The files hold torchvision's ResNet-50 with random weights, pruned in one step: globally by `sparsify`, or with the same
rate in each layer, which distributes the zeros most evenly. ``--checkpoint FILE`` measures the sizes for the state_dict
of a trained network instead.

`save_sparse` is compared with torch.save of the dense state_dict, the same file in gzip -9 and in zstandard (at the
level of `save_sparse`), safetensors, and torch.save of sparse tensors. Each format loads from the page cache to a dense
state_dict in memory. The formats alternate in this process. A process usually loads a model once, into fresh memory, so
torch.load and load_sparse are also measured in new processes.
"""

from __future__ import annotations

import argparse
import gzip
import io
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import safetensors.torch
import torch
import zstandard
from torch import Tensor
from tqdm import tqdm

import feather_param
from benchmarks import timing
from feather_param import load_sparse, save_sparse, schedules

RATES = (0.9, 0.95, 0.98, 0.99)
DENSE = "torch.save, dense"
State = dict[str, Tensor]
Save = Callable[[State, Path], object]
Load = Callable[[Path], State]


def resnet50(rate: float, alike: bool) -> State:
    """Return a state_dict with this fraction of zeros among the prunable weights."""
    from torchvision.models import resnet50 as build

    torch.manual_seed(0)
    model = build()
    if alike:
        for weight in model.parameters():
            if weight.dim() > 1:
                data = weight.detach().abs().flatten()
                threshold = data.kthvalue(round(rate * data.numel())).values
                weight.data[weight.abs() <= threshold] = 0
        return model.state_dict()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing survives")
        feather_param.sparsify(model, final_rate=rate, total_steps=1, schedule=schedules.constant)
        feather_param.desparsify(model)
    return model.state_dict()


def save_safetensors(state: State, path: Path) -> None:
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def save_gzip(state: State, path: Path) -> None:
    path.write_bytes(gzip.compress(_dense(state), 9))


def load_gzip(path: Path) -> State:
    return torch.load(io.BytesIO(gzip.decompress(path.read_bytes())), weights_only=True)


def save_zstd(state: State, path: Path) -> None:
    path.write_bytes(zstandard.ZstdCompressor(level=12).compress(_dense(state)))


def load_zstd(path: Path) -> State:
    return torch.load(io.BytesIO(zstandard.ZstdDecompressor().decompress(path.read_bytes())), weights_only=True)


def _dense(state: State) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def save_csr(state: State, path: Path) -> None:
    """Save matrices as CSR with 32-bit indices, half of what torch takes by itself."""
    sparse: dict[str, Any] = {}
    for name, tensor in state.items():
        sparse[name] = tensor
        if tensor.dim() > 1:
            csr = tensor.flatten(1).to_sparse_csr()
            indices = csr.crow_indices().int(), csr.col_indices().int()
            sparse[name] = (torch.sparse_csr_tensor(*indices, csr.values(), csr.shape), tensor.shape)
    torch.save(sparse, path)


def save_coo(state: State, path: Path) -> None:
    torch.save({n: (t.to_sparse(), t.shape) if t.dim() > 1 else t for n, t in state.items()}, path)


def load_torch_sparse(path: Path) -> State:
    loaded = torch.load(path, weights_only=True)
    return {n: t[0].to_dense().reshape(t[1]) if isinstance(t, tuple) else t for n, t in loaded.items()}


def load_torch(path: Path) -> State:
    return torch.load(path, weights_only=True)


FORMATS: dict[str, tuple[Save, Load]] = {
    DENSE: (torch.save, load_torch),
    "safetensors, dense": (save_safetensors, safetensors.torch.load_file),
    "dense, gzip -9": (save_gzip, load_gzip),
    "dense, zstandard": (save_zstd, load_zstd),
    "torch.save, COO": (save_coo, load_torch_sparse),
    "torch.save, CSR (int32)": (save_csr, load_torch_sparse),
    "save_sparse": (save_sparse, load_sparse),
    "save_sparse, zstd": (lambda state, path: save_sparse(state, path, zstd=True), load_sparse),
}
FRESH = (DENSE, "save_sparse", "save_sparse, zstd")


def measure(state: State, n: int = 0) -> dict[str, dict[str, float]]:
    """Return the megabytes of each format and, over n rounds, the seconds and their ratios to torch's dense file."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / str(i) for i, name in enumerate(FORMATS)}
        figures: dict[str, dict[str, float]] = {}
        for name, (save, load) in FORMATS.items():
            start = time.perf_counter()
            save(state, paths[name])
            figures[name] = {"save seconds": time.perf_counter() - start, "MB": paths[name].stat().st_size / 1e6}
            loaded = load(paths[name])
            if not all(torch.equal(loaded[key], tensor) for key, tensor in state.items()):
                raise AssertionError(f"{name} lost something")
        if not n:
            return {name: {"MB": row["MB"]} for name, row in figures.items()}
        loads = timing.rounds({name: lambda name=name: FORMATS[name][1](paths[name]) for name in FORMATS}, n)
        fresh: dict[str, list[float]] = {name: [] for name in FRESH}
        for _ in range(n):
            for name, seconds in fresh.items():
                seconds.append(_in_new_process(name, paths[name]))
        for name, row in figures.items():
            row["load seconds"] = median(loads[name])
            row["load over torch.load"] = timing.ratio(loads, name, DENSE)
            if name in fresh:
                row["first load seconds"] = median(fresh[name])
                row["first load over torch.load"] = timing.ratio(fresh, name, DENSE)
    return figures


def _in_new_process(name: str, path: Path) -> float:
    """Return the seconds of the first load in a new process."""
    command = [sys.executable, "-m", "benchmarks.files", "--first", name, str(path)]
    root = Path(__file__).parent.parent
    return float(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout)


def table(title: str, columns: dict[str, dict[str, dict[str, float]]], key: str, form: str) -> str:
    """Return a table of one figure, with a row for each format and a column for each file."""
    names = [name for name in FORMATS if key in next(iter(columns.values()))[name]]
    rows = [[name, *(format(column[name][key], form) for column in columns.values())] for name in names]
    return timing.show([title, *columns], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", nargs="+", type=Path, metavar="FILE", help="files of torch.save with state_dicts"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first", nargs=2, metavar=("FORMAT", "FILE"), help="only print the seconds of one load")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # from torch: sparse tensors are in beta, and are checked when loaded
    if arguments.first:
        name, path = arguments.first
        start = time.perf_counter()
        state = FORMATS[name][1](Path(path))
        print(time.perf_counter() - start)
        del state
        return
    if arguments.checkpoint:
        columns = {path.stem: measure(load_torch(path)) for path in arguments.checkpoint}
        print(table("MB", columns, "MB", ".3f"))
        print(f"\nwritten to {timing.write('files_checkpoint', columns)}")
        return
    columns = {f"{rate:.0%}": measure(resnet50(rate, False), arguments.rounds) for rate in tqdm(RATES)}
    alike = {f"{rate:.0%}": measure(resnet50(rate, True)) for rate in tqdm(RATES)}
    print(table("MB", columns, "MB", ".2f"), end="\n\n")
    for key in ("load over torch.load", "first load over torch.load"):
        print(table(key, columns, key, ".2f"), end="\n\n")
    for key in ("load seconds", "first load seconds", "save seconds"):
        print(table(key, columns, key, ".3f"), end="\n\n")
    print(table("MB, every layer alike", alike, "MB", ".2f"))
    print(f"\nwritten to {timing.write('files', {'files': columns, 'every layer alike': alike})}")


if __name__ == "__main__":
    main()

"""One update of the global threshold: `python -m benchmarks.threshold`.

Compares `Controller.step()` at 25.6 million weights in 53 tensors with other implementations: the paper's code
(concatenate, abs, sort, ``.item()``), `torch.nn.utils.prune.global_unstructured`, and `torch.ao.pruning`, which ranks
each layer by itself. The bound is one ``abs()`` pass over the weights, as one tensor or as 53 tensors. The result of
one tensor takes new memory from the system each time. The results of 53 tensors reuse memory. The other tables show
the growth with the number of weights, the dtypes, and the peak of extra memory, which a separate process measures.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune
from tqdm import tqdm

import feather_param
from benchmarks import timing
from benchmarks.papers_code import RATE, papers_threshold


def layers(weights: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return a model of 53 linear layers of unequal sizes without biases, with this total number of weights."""
    parts = [1 + i % 7 for i in range(53)]
    sizes = [weights * part // sum(parts) // 64 for part in parts]
    model = nn.Sequential(*(nn.utils.skip_init(nn.Linear, 64, size, bias=False) for size in sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.to(dtype)


def controlled(model: nn.Module) -> feather_param.Controller:
    """Return a controller at its final rate."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing survives")
        return feather_param.sparsify(model, final_rate=RATE, total_steps=10**6, end_step=0)


def torch_prune(model: nn.Module) -> None:
    """Prune globally with torch.nn.utils.prune, and remove its masks again."""
    places: list[tuple[nn.Module, str]] = [(layer, "weight") for layer in model.children()]
    prune.global_unstructured(places, pruning_method=prune.L1Unstructured, amount=RATE)
    for layer, name in places:
        original: Any = layer.weight_orig
        prune.remove(layer, name)
        layer.weight = nn.Parameter(original.detach())


def torch_ao(model: nn.Sequential) -> Any:
    """Return the update of torch.ao.pruning's sparsifier: unstructured, for each layer by itself."""
    from torch.ao.pruning.sparsifier.weight_norm_sparsifier import WeightNormSparsifier

    sparsifier = WeightNormSparsifier(sparsity_level=RATE, sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(model, [{"tensor_fqn": f"{i}.weight"} for i in range(len(model))])
    return sparsifier.step


def compare(weights: int, n: int) -> dict[str, Any]:
    """Return the median times and the ratios of all variants at one size."""
    plain, for_prune, for_ao, model = (layers(weights) for _ in range(4))
    controller = controlled(model)
    joined = torch.cat([parameter.detach().flatten() for parameter in plain.parameters()])
    variants = {
        "one abs() pass, one tensor": joined.abs,
        "one abs() pass, 53 tensors": lambda: [parameter.detach().abs() for parameter in plain.parameters()],
        "Controller.step()": controller.step,
        "concatenate, abs, sort, item (the paper's code)": lambda: papers_threshold(plain.parameters()),
        "torch.nn.utils.prune.global_unstructured": lambda: torch_prune(for_prune),
        "torch.ao.pruning, per layer": torch_ao(for_ao),
    }
    seconds = timing.rounds(variants, n)
    median = timing.medians(seconds)
    return {
        name: {
            "seconds": median[name],
            "over abs()": timing.ratio(seconds, name, "one abs() pass, one tensor"),
            "over abs(), memory reused": timing.ratio(seconds, name, "one abs() pass, 53 tensors"),
            "over ours": timing.ratio(seconds, name, "Controller.step()"),
        }
        for name in variants
    }


def growth(sizes: list[int], n: int) -> list[dict[str, float]]:
    """Return the time of one update over the time of one abs() pass, for each size."""
    rows = []
    for size in tqdm(sizes, desc="sizes", leave=False):
        model = layers(size)
        controller = controlled(model)
        joined = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        seconds = timing.rounds({"abs": joined.abs, "step": controller.step}, n)
        median = timing.medians(seconds)
        rows.append(
            {
                "weights": float(size),
                "seconds": median["step"],
                "over abs()": timing.ratio(seconds, "step", "abs"),
                "nanoseconds a weight": median["step"] / size * 1e9,
            }
        )
        del model, controller, joined
    return rows


def dtypes(weights: int, n: int) -> dict[str, float]:
    """Return the time of one update for each dtype over the time for float32."""
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    controllers = {str(dtype): controlled(layers(weights, dtype)) for dtype in kinds}
    seconds = timing.rounds({name: controller.step for name, controller in controllers.items()}, n)
    return {name: timing.ratio(seconds, name, "torch.float32") for name in controllers}


def peak(weights: int, variant: str) -> float:
    """Return the peak of extra memory of one update, in bytes a weight (Linux only)."""
    command = [sys.executable, "-m", "benchmarks.threshold", "--peak", variant, "--weights", str(weights)]
    root = Path(__file__).parent.parent
    return float(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout)


def _measure_peak(weights: int, variant: str) -> float:
    model = layers(weights)
    update = controlled(model).step if variant == "ours" else lambda: papers_threshold(model.parameters())
    if variant == "ours":
        controlled(layers(10_000)).step()  # the first call loads modules
    else:
        papers_threshold(layers(10_000).parameters())
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM
    update()
    return (_status("VmHWM") - before) / weights


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, default=25_600_000)
    parser.add_argument("--largest", type=int, default=400_000_000, help="largest number of weights of the curve")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--peak", choices=["ours", "papers"], help="only print the peak of extra memory, in bytes a weight"
    )
    arguments = parser.parse_args()
    if arguments.peak:
        print(_measure_peak(arguments.weights, arguments.peak))
        return
    comparison = compare(arguments.weights, arguments.rounds)
    sizes = [10**6 * millions for millions in (1, 4, 16, 64, 256, 400)]
    curve = growth([size for size in sizes if size <= arguments.largest], arguments.rounds)
    kinds = dtypes(arguments.weights, arguments.rounds)
    memory = {variant: peak(arguments.weights, variant) for variant in ("ours", "papers")}
    print(
        timing.show(
            ["one update", "ms", "over one abs() pass", "over one, memory reused", "over ours"],
            [
                [name, f"{1e3 * row['seconds']:.1f}", *(f"{value:.2f}" for value in list(row.values())[1:])]
                for name, row in comparison.items()
            ],
        )
    )
    print()
    print(
        timing.show(
            ["weights", "ms", "over one abs() pass", "ns a weight"],
            [
                [
                    f"{row['weights'] / 1e6:.0f} M",
                    f"{1e3 * row['seconds']:.1f}",
                    f"{row['over abs()']:.2f}",
                    f"{row['nanoseconds a weight']:.2f}",
                ]
                for row in curve
            ],
        )
    )
    print()
    print(timing.show(["dtype", "over float32"], [[name, f"{value:.2f}"] for name, value in kinds.items()]))
    print()
    print(timing.show(["peak of extra memory", "bytes a weight"], [[w, f"{b:.2f}"] for w, b in memory.items()]))
    figures = {"comparison": comparison, "growth": curve, "dtypes": kinds, "peak bytes a weight": memory}
    print(f"\nwritten to {timing.write('threshold', figures)}")


if __name__ == "__main__":
    main()

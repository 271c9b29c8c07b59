"""Time of a whole training step, sparse over dense: `python -m benchmarks.training_step`.

One step is the forward pass, the backward pass, `optimizer.step()` and, for the sparse network, `controller.step()`.
The networks take turns, step by step. ``--compile`` measures them under `torch.compile`, and ``--captured`` in CUDA
graphs.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import archs
import feather_param
from benchmarks import timing
from benchmarks.device import captured
from benchmarks.papers_code import PapersSparsity


def resnet50() -> nn.Module:
    """Return torchvision's ResNet-50."""
    from torchvision.models import resnet50 as build

    return build(weights=None)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20": (archs.resnet20, (128, 3, 32, 32)),
    "mobilenet_v1": (archs.mobilenet_v1, (128, 3, 32, 32)),
    "densenet": (archs.densenet, (128, 3, 32, 32)),
    "resnet50": (resnet50, (16, 3, 224, 224)),
}


def stepper(
    kind: str,
    build: Callable[[], nn.Module],
    x: Tensor,
    compiled: bool,
    amp: bool,
    early: bool,
    channels_last: bool = False,
    backend: str = "inductor",
) -> Callable[[], None]:
    """Return a function that makes one training step of a network.

    The kind is ``dense``, ``sparse`` (with p = 3), ``paper`` (sparse with the paper's code), or ``p=`` and an exponent.
    The gradients are freed after the forward pass, or before it if `early`. `benchmarks.device.captured` records the
    step in a CUDA graph.
    """
    torch.manual_seed(0)
    model = build().to(x.device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(100, (len(x),), device=x.device)
    after: Callable[[], object] = lambda: None  # noqa: E731
    if kind == "sparse" or kind.startswith("p="):
        p = 3.0 if kind == "sparse" else float(kind.removeprefix("p="))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "nothing survives|fewer survivors")
            after = feather_param.sparsify(model, final_rate=0.95, total_steps=10**6, end_step=0, p=p).step
    elif kind == "paper":
        after = PapersSparsity(model).update
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    forward = torch.compile(model, backend=backend) if compiled else model

    def step() -> None:
        if early:
            optimizer.zero_grad()
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(forward(x), y)
        if not early:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--captured", action="store_true", help="record each step in a CUDA graph; not with --paper")
    parser.add_argument("--channels-last", action="store_true", help="channels last in memory")
    parser.add_argument("--paper", action="store_true", help="also measure the paper's code")
    parser.add_argument("--powers", nargs="*", type=float, default=[], help="also measure these exponents p")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16 where that is safe (autocast)")
    parser.add_argument("--zero-grad-first", action="store_true", help="call zero_grad() before the forward pass")
    parser.add_argument("--suffix", default="", help="suffix of the name of the results file")
    arguments = parser.parse_args()
    if arguments.captured and arguments.paper:
        parser.error("argument --captured: expected no --paper, got it; the paper's code waits for its threshold")
    graphs = "_captured" if arguments.captured else ""
    output = "training_step" + ("_compiled" if arguments.compile else "") + graphs + arguments.suffix
    figures: dict[str, Any] = {}
    rows = []
    path = None
    flags = arguments.compile, arguments.amp, arguments.zero_grad_first, arguments.channels_last
    kinds = ["dense", "sparse", *["paper"] * arguments.paper, *(f"p={p:g}" for p in arguments.powers)]
    for name in tqdm(arguments.networks, desc="networks"):
        build, shape = NETWORKS[name]
        x = torch.randn(shape, device=arguments.device)
        variants = {kind: stepper(kind, build, x, *flags) for kind in kinds}
        if arguments.captured:
            variants = {kind: captured(step, x.device) for kind, step in variants.items()}
        seconds = timing.rounds(variants, arguments.rounds, warmup=2)
        median = timing.medians(seconds)
        ratios = {kind: timing.ratio(seconds, kind, "dense") for kind in kinds[1:]}
        figures[name] = {"seconds": median, "over dense": ratios}
        rows.append([name, f"{1e3 * median['dense']:.0f}", *(f"{value:.3f}" for value in ratios.values())])
        path = timing.write(output, figures)  # keeps this network if a later one fails
    print(timing.show(["network", "dense ms", *(f"{kind} over dense" for kind in kinds[1:])], rows))
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()

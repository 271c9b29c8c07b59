"""What the blocks of code of the documentation take as given: a prelude for each page, called before each section.

A prelude gets the heading of the section, and the names of the page so far, which it changes. `tests/test_pages.py`
runs the blocks. Pages without a prelude are run by a test that names them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import archs
import feather_param

Scope = dict[str, Any]
_INTEGRATIONS = "this block needs feather_param[integrations]"


class Network(nn.Module):
    """A network with the names that the pages use."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(8, 16)
        self.block = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(x))


class Tied(Network):
    """A network whose head and embedding are one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = self.emb
        self.head.weight = self.embedding.weight


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8)
        self.fc = nn.Linear(8, 4)


class Block(nn.Module):
    """A block of GPT-2, with transformers' Conv1D, that can be saved as its models can."""

    def __init__(self) -> None:
        super().__init__()
        Conv1D = pytest.importorskip("transformers.pytorch_utils", reason=_INTEGRATIONS).Conv1D
        self.attn = nn.ModuleDict({"c_attn": Conv1D(48, 16), "c_proj": Conv1D(16, 16)})
        self.mlp = nn.ModuleDict({"c_fc": Conv1D(64, 16)})

    def save_pretrained(self, folder: str, *, state_dict: dict[str, torch.Tensor]) -> None:
        torch.save(state_dict, folder)


def choosing(section: str, scope: Scope) -> None:
    scope.update(model=Network(), steps=10)


def layers(section: str, scope: Scope) -> None:
    models = {"LSTM, GRU, RNN": Recurrent, "Tied weights": Tied}
    if section.startswith("GPT-2"):
        scope.update(model=nn.ModuleDict({"h": Block()}))
        scope["model"].save_pretrained = scope["model"].h.save_pretrained
    else:
        scope.update(model=models.get(section, Network)())
    scope["total"] = 10


def allocations(section: str, scope: Scope) -> None:
    scope["model"] = archs.mobilenet_v1() if section.startswith("First, last") else archs.resnet20(width=4)


def patterns(section: str, scope: Scope) -> None:
    scope["model"] = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    if section == "Whole channels":
        scope["model"] = archs.resnet20(num_classes=10, in_channels=1, width=4)
        scope["x"] = torch.randn(1, 1, 8, 8)
        feather_param.sparsify(scope["model"], final_rate=0.98, total_steps=1, end_step=0, p=1)


def loops(section: str, scope: Scope) -> None:
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 16)
    scope.update(model=model, optimizer=optimizer, x=x, total=10, scaler=torch.amp.GradScaler("cpu"), build=Network)
    scope.update(loss=sum(each.sum() for each in model.parameters()), block=model.block, train=trained)
    if section in ("Optimizers", "Fixed zeros", "torch.func"):
        scope["controller"] = feather_param.sparsify(model, final_rate=0.5, total_steps=10, end_step=0)
    if section == "Load weights":
        torch.save(model.state_dict(), "pretrained.pt")
    if section == "Fine-tune a sparse file":
        feather_param.sparsify(model, final_rate=0.95, total_steps=1, end_step=0)
        feather_param.desparsify(model)
        feather_param.save_sparse(model, "sparse.safetensors")


def trained(model: nn.Module, controller: feather_param.Controller, steps: int = 4) -> None:
    """Train a network for some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        controller.step()


def ema(section: str, scope: Scope) -> None:
    scope.update(model=Network(), total=10, copy=copy, evaluate=lambda model: model(torch.ones(1, 16)))
    if section == "Swapped weights":
        schedulefree = pytest.importorskip("schedulefree", reason=_INTEGRATIONS)
        scope["optimizer"] = schedulefree.SGDScheduleFree(scope["model"].parameters(), lr=0.1)
        scope["optimizer"].train()
    if section != "EMA":
        scope["controller"] = feather_param.sparsify(scope["model"], final_rate=0.5, total_steps=10, end_step=0)


def processes(section: str, scope: Scope) -> None:
    """Make a group of one process."""
    if section == "FSDP2" and torch.__version__ < "2.8":
        pytest.skip("FSDP2 on a CPU needs torch 2.8")
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    from torch.distributed.fsdp import fully_shard

    scope.update(model=Network(), total=10, rank=0, fully_shard=fully_shard)


def reports(section: str, scope: Scope) -> None:
    scope.update(model=Network(), loader=[torch.randn(4, 16)] * 2, epochs=2, example_input=torch.randn(1, 16))
    scope["train_one_epoch"] = lambda model, loader, controller: trained(model, controller, len(loader))


def inference(section: str, scope: Scope) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    feather_param.sparsify(model, final_rate=0.9, total_steps=1, end_step=0)
    feather_param.desparsify(model)
    scope.update(model=model, build=lambda: nn.Sequential(nn.Linear(64, 64)))
    scope.update(example_input=torch.randn(1, 64), x=torch.randn(1, 64))


def migration(section: str, scope: Scope) -> None:
    def train_one_epoch() -> None:
        for _ in scope["loader"]:
            scope["model"](torch.randn(4, 16)).sum().backward()
            if "controller" in scope and next(scope["model"].parameters()).grad is not None:
                scope["controller"].step()

    scope.update(model=Network(), loader=range(2), epochs=2, train_one_epoch=train_one_epoch)
    scope.pop("controller", None)


def troubleshooting(section: str, scope: Scope) -> None:
    transformers = pytest.importorskip("transformers", reason=_INTEGRATIONS)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    scope["model"] = transformers.BertModel(transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **sizes))
    feather_param.sparsify(scope["model"], final_rate=0.8, total_steps=1, end_step=0)


def nothing(section: str, scope: Scope) -> None:
    """The page needs no prelude: it is complete."""


SHORTENED = {"docs/index.md": ("epochs = 15", "epochs = 1")}
"""Text of a page, and what a test runs in its place, to save time."""

PRELUDES: dict[str, Callable[[str, Scope], None]] = {
    "CONTRIBUTING.md": nothing,
    "docs/allocations.md": allocations,
    "docs/choosing.md": choosing,
    "docs/ema.md": ema,
    "docs/feather-param-command.md": nothing,
    "docs/index.md": nothing,
    "docs/inference.md": inference,
    "docs/layers.md": layers,
    "docs/loops.md": loops,
    "docs/migration.md": migration,
    "docs/patterns.md": patterns,
    "docs/processes.md": processes,
    "docs/reports.md": reports,
    "docs/troubleshooting.md": troubleshooting,
}

"""A small model for each kind of layer that can be pruned, with the argument ``include`` that selects its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations


class Conv1D(nn.Module):
    """The linear layer of GPT-2, with a transposed weight."""

    def __init__(self, out: int, inp: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inp, out) * 0.1)
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Call(nn.Module):
    """A module that a function calls, so that it takes one input and returns one output."""

    def __init__(self, module: nn.Module, call: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        out = self.call(self.module, x)
        return out[0] if isinstance(out, tuple) else out


class UsedTwice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.norm(self.first(x)))


class TiedHead(nn.Module):
    """A language model whose head has the weight of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(x.argmax(-1) % 20)))


def attention(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, x, x)


def attention_with_other_sizes() -> nn.Module:
    return nn.MultiheadAttention(16, 4, kdim=12, vdim=8, batch_first=True)


CASES: dict[str, tuple[Callable[[], nn.Module], str | list[str] | None]] = {
    "MultiheadAttention": (
        lambda: Call(nn.MultiheadAttention(16, 4, batch_first=True), attention),
        ["*.in_proj_weight", "*.out_proj"],
    ),
    "MultiheadAttention with other sizes": (
        lambda: Call(attention_with_other_sizes(), lambda module, x: module(x, x[..., :12], x[..., :8])),
        ["*.q_proj_weight", "*.k_proj_weight", "*.v_proj_weight", "*.out_proj"],
    ),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2),
        ["*.in_proj_weight", "*.linear1", "*.linear2", "*.out_proj"],
    ),
    "TransformerDecoder": (
        lambda: Call(
            nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, batch_first=True), 2),
            lambda module, x: module(x, x),
        ),
        ["*.in_proj_weight", "*.linear?", "*.out_proj"],
    ),
    "LSTM": (lambda: Call(nn.LSTM(16, 8, 2, bidirectional=True), nn.Module.__call__), "*.weight_[ih]h_l*"),
    "GRU": (lambda: Call(nn.GRU(16, 8), nn.Module.__call__), ["*.weight_ih_l0", "*.weight_hh_l0"]),
    "RNN": (lambda: Call(nn.RNN(16, 8), nn.Module.__call__), ["*.weight_ih_l0", "*.weight_hh_l0"]),
    "Bilinear": (lambda: Call(nn.Bilinear(16, 16, 4), lambda module, x: module(x, x)), "module.weight"),
    "Embedding": (lambda: Call(nn.Embedding(20, 16), lambda module, x: module(x.argmax(-1) % 20)), "module.weight"),
    "Conv1D of GPT-2": (lambda: nn.Sequential(Conv1D(8, 16), nn.Linear(8, 4)), ["0.weight", "1.weight"]),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 3, 3, groups=1), None),
    "ConvTranspose2d": (
        lambda: Call(nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2), lambda module, x: module(x[..., None])),
        None,
    ),
    "a layer under two names": (UsedTwice, None),
    "a tied head": (TiedHead, ["embedding.weight", "head.weight", "body"]),
    "a tied head stays dense": (TiedHead, None),
    "weight_norm": (lambda: torch_parametrizations.weight_norm(nn.Linear(16, 8)), None),
}

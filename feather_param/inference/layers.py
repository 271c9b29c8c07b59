"""Layers that compute without the zeros of their weights, on a CPU in float32."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feather_param.inference.plan import Plan, plan
from feather_param.inference.layout import Geometry

__all__ = ["SparseLayer"]


class SparseLayer(nn.Module):
    crow: Tensor
    col: Tensor
    values: Tensor
    bias: Tensor

    def __init__(
        self,
        layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d,
        activation: str = "identity",
        rows: int | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        weight = layer.weight.detach()
        self.padding_mode, self.padding = "zeros", ()
        if isinstance(layer, nn.Linear):
            self.geometry = Geometry(weight.shape[1], weight.shape[0], 1, (1,), (1,), (1,), (0,), (0,))
            self.dims = 0
        else:
            self.padding_mode = layer.padding_mode
            padding = tuple(layer._reversed_padding_repeated_twice)  # numbers, also for padding="same"
            if self.padding_mode != "zeros":
                self.padding, padding = padding, (0,) * len(padding)
            before, after = padding[-2::-2], padding[-1::-2]
            self.geometry = Geometry(
                weight.shape[1],
                weight.shape[0],
                layer.groups,
                layer.kernel_size,
                layer.stride,
                layer.dilation,
                before,
                after,
            )
            self.dims = len(layer.kernel_size)
        matrix = weight.reshape(weight.shape[0], -1)
        self.rows = _rows(matrix, layer.weight.shape[0] // self.geometry.groups) if rows is None else rows
        blocks = matrix.view(-1, self.rows, matrix.shape[1])
        used = blocks.any(1) if self.rows > 1 else (blocks[:, 0] != 0)
        block, col = used.nonzero(as_tuple=True)
        counts = torch.bincount(block, minlength=len(blocks))
        self.register_buffer("crow", F.pad(counts.cumsum(0), (1, 0)).int())
        self.register_buffer("col", col.int())
        self.register_buffer("values", blocks[block, :, col].contiguous() if self.rows > 1 else matrix[block, col])
        self.register_buffer(
            "bias", weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().clone()
        )
        self._plans: dict[Any, Plan] = {}

    def extra_repr(self) -> str:
        return f"nonzeros={self.values.numel()}, rows={self.rows}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}}  # without the caches

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.padding:
            input = F.pad(input, self.padding, self.padding_mode)
        x = input.detach().contiguous()
        leading = x.shape[: x.dim() - 1 - self.dims]
        sizes = x.shape[len(leading) + 1 :]
        key = x.shape, torch.get_num_threads()
        p = self._plans.get(key)
        if p is None:
            p = self._plans[key] = plan(self, math.prod(leading), sizes or None)
        y = x.new_empty(*leading, self.geometry.out_channels, *p.out)
        p.run(x, y, residual)
        return y


def _rows(matrix: Tensor, group: int) -> int:
    if group % 4:
        return 1
    used = (matrix != 0).view(-1, 4, matrix.shape[1])
    blocks, elements = int(used.any(1).sum()), int(used.sum())
    return 4 if blocks * 3.1 < elements else 1

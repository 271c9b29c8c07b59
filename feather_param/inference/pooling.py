"""Max pooling by the kernel of the sparse layers, which is faster than torch's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from feather_param.inference.engine import kernel
from feather_param.inference.engine.inputs import contiguous, readable
from feather_param.inference.engine.layout import Geometry, Sizes
from feather_param.inference.engine.matrix import Matrix
from feather_param.inference.engine.plan import Plan
from feather_param.inference.engine.plans import Plans
from feather_param.ops.tracing import concrete

MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


class FastMaxPool(nn.Module):
    """Max pooling with the results of torch's, bit for bit, for inference on a CPU in float32.

    Other inputs, and those that need a gradient, are given to torch's own layer.

    Args:
        pool: a MaxPool1d, MaxPool2d or MaxPool3d.

    Raises:
        ValueError: ``pool`` returns indices.

    Example:
        >>> pool = nn.MaxPool2d(3, stride=2, padding=1)
        >>> x = torch.randn(1, 8, 20, 20)
        >>> torch.equal(FastMaxPool(pool)(x), pool(x))
        True
    """

    def __init__(self, pool: nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d) -> None:
        super().__init__()
        if pool.return_indices:
            raise ValueError("expected a layer without return_indices, got one with it; use torch's layer")
        self.pool = pool
        self._dims = MAX_POOLS.index(type(pool)) + 1
        self._plans = Plans()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": Plans()}

    def forward(self, input: Tensor) -> Tensor:
        """Return the largest element of each window."""
        plan = self._plan(input)
        if plan is None:
            return self.pool(input)
        x = contiguous(input.detach())
        y = x.new_empty(plan.shape)
        plan.run(x, y)
        return y.squeeze(-self._dims - 1)

    def _plan(self, x: Tensor) -> Plan | None:
        """Return the plan for an input, or None for torch's layer."""
        if not (concrete(x) and readable(x)) or (x.requires_grad and torch.is_grad_enabled()):
            return None
        key = x.shape, kernel.available_threads()
        plan = self._plans.get(key)
        if plan is None and (plan := self._planned(x)) is not None:
            self._plans.add(key, plan)
        return plan

    def _planned(self, x: Tensor) -> Plan | None:
        sizes, dims = tuple(x.shape[-self._dims :]), self._dims
        if x.dim() not in (dims + 1, dims + 2) or not x.numel():
            return None
        pool = self.pool
        window, stride, padding, dilation = (
            _each(value, dims) for value in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        )
        numbers = zip(sizes, window, stride, padding, dilation, strict=True)
        out = [_outputs(*some, ceil=pool.ceil_mode) for some in numbers]
        if min(out) < 1 or any(2 * pad > k for pad, k in zip(padding, window, strict=True)):
            return None  # torch's layer raises the error
        # As much padding as the last window needs. It may be negative.
        after = [
            (n - 1) * s + d * (k - 1) + 1 - size - pad
            for n, s, d, k, size, pad in zip(out, stride, dilation, window, sizes, padding, strict=True)
        ]
        geometry = Geometry(1, 1, 1, window, stride, dilation, padding, tuple(after))
        columns, empty = np.arange(math.prod(window), dtype=np.int32), np.empty(0, np.float32)
        start = np.array([0, len(columns)], np.int32)
        matrix = Matrix(geometry, "identity", 0, start, columns, empty, empty)  # a row with all elements of the window
        return Plan(matrix, tuple(x.shape[: -self._dims]), sizes)


def _each(value: int | Sizes, dims: int) -> Sizes:
    """Return a setting for each dimension."""
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _outputs(size: int, window: int, stride: int, padding: int, dilation: int, *, ceil: bool) -> int:
    """Return the number of outputs in a dimension. In ceil mode, no window begins in the padding after the image."""
    rest = size + 2 * padding - dilation * (window - 1) - 1
    if not ceil:
        return rest // stride + 1
    outputs = -(-rest // stride) + 1
    return outputs - 1 if (outputs - 1) * stride >= size + padding else outputs

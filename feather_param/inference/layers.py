"""Layers that compute without the zeros of their weights, on a CPU in float32."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feather_param.inference.fuse import ACTIVATIONS, FusedLayer
from feather_param.inference.layout import Geometry, Sizes
from feather_param.inference.plan import NATIVE_ACTIVATIONS, Plan

__all__ = ["SparseLayer"]

_BLOCK = 4  # output channels that may share their columns
_BLOCK_COST = 3.1  # time of a column of such a block, in times of a column of one output channel (measured)


class SparseLayer(nn.Module):
    """Compute the output of a Linear or Conv layer, up to rounding, from the weights that are not zero.

    The weight of each group is a matrix of shape [out channels, in channels * window], in the block sparse row format
    with blocks of 1 x 1, or of 4 x 1 if that is faster (a pattern of such blocks, or few zeros). The kernel multiplies
    it by the inputs (`feather_param.inference.kernel`).

    Shape:
        As those of the layer, in float32 on the CPU. CPU autocast converts inputs of other dtypes to float32.

    Args:
        layer: a Linear, Conv1d, Conv2d or Conv3d, or a `FusedLayer` of one. It is not changed.

    Raises:
        TypeError: the input has another dtype or device.
        ValueError: the input has another number of channels or dimensions, or is smaller than the window.
        RuntimeError: the input requires a gradient outside `torch.no_grad`, or the layer is traced.
        ImportError: llvmlite is not installed.

    Example:
        >>> layer = nn.Conv2d(3, 8, 3, padding=1)
        >>> _ = layer.weight.data.bernoulli_(0.1)
        >>> x = torch.randn(2, 3, 5, 5)
        >>> with torch.no_grad():
        ...     torch.allclose(SparseLayer(layer)(x), layer(x), atol=1e-5)
        True
    """

    block_start: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.activation, self.input_dims = "identity", None
        if isinstance(layer, FusedLayer):
            self.activation, self.input_dims, layer = layer.activation, layer.dims, layer.layer
        self.geometry, self.padding_mode, self.padding = _geometry(layer)
        self.dims = 0 if isinstance(layer, nn.Linear) else len(self.geometry.kernel_size)
        with torch.no_grad():
            matrix = layer.weight.detach().flatten(1)
            self.rows = _rows(matrix, self.geometry.groups)
            blocks = matrix.view(-1, self.rows, matrix.shape[1])
            block, column = blocks.any(1).nonzero(as_tuple=True)
            counts = torch.bincount(block, minlength=len(blocks))
            bias = matrix.new_zeros(len(matrix)) if layer.bias is None else layer.bias.detach().clone()
            self.register_buffer("block_start", F.pad(counts.cumsum(0), (1, 0)).int())
            self.register_buffer("columns", column.int())
            self.register_buffer("values", blocks[block, :, column])
            self.register_buffer("bias", bias)
        self._plans: dict[Any, Plan] = {}

    def extra_repr(self) -> str:
        g = self.geometry
        window = f", window={g.kernel_size}" if self.dims else ""
        nonzeros = int(self.values.count_nonzero())
        return f"{g.channels * g.groups}, {g.out_channels}{window}, nonzeros={nonzeros}, activation={self.activation!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}}

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLayer:
        self._plans.clear()  # they point to the buffers
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self._plans.clear()
        super()._load_from_state_dict(*arguments, **keywords)

    @property
    def weight(self) -> Tensor:
        """The weight as a sparse matrix. Code may read its dtype, shape and device."""
        g = self.geometry
        group = torch.repeat_interleave(self.block_start.diff()) * self.rows // (g.out_channels // g.groups)
        window = math.prod(g.kernel_size)
        shape = (g.out_channels, g.channels * g.groups * window)
        columns = (self.columns + group * g.channels * window).int()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse (BSR|CSR) tensor support|.*invariant checks")
            values = self.values[:, :, None]
            return torch.sparse_bsr_tensor(self.block_start, columns, values, shape, check_invariants=False)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            raise RuntimeError(
                "expected a call that is not traced, got one in torch.jit.trace, which would record the output as a "
                "constant; export the dense model"
            )
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self(input.float(), residual if residual is None else residual.float())
        for kind, tensor in (("input", input), ("weight", self.values)):
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                got = f"{kind} of {tensor.dtype} on {tensor.device}"
                raise TypeError(f"expected input and weight in float32 on the CPU, got {got}; use the dense model")
        if torch.is_grad_enabled() and (input.requires_grad or (residual is not None and residual.requires_grad)):
            raise RuntimeError("expected an input without gradient, for inference only; use the dense model")
        if self.input_dims is not None and input.dim() != self.input_dims:
            raise ValueError(f"expected an input of {self.input_dims} dimensions, got {input.dim()}")
        if self.padding:
            input = F.pad(input, self.padding, self.padding_mode)
        x = input.detach().contiguous()
        threads = torch.get_num_threads()
        found = self._plans.get((x.shape, threads))
        if found is None:
            found = self._plans[x.shape, threads] = self._plan(x.shape)
        output = x.new_empty(found.shape)
        if residual is not None and (not self.dims or residual.shape != output.shape):
            return self._added(input, residual)
        found.run(x, output, residual if residual is None else residual.detach().contiguous())
        return output if self.activation in NATIVE_ACTIVATIONS else ACTIVATIONS[self.activation](output)

    # `torch.compiler.disable` sets this too, so that a compiled model calls this method as it is. Importing it takes a
    # second.
    forward._torchdynamo_disable = True  # pyright: ignore[reportFunctionMemberAccess]

    def _plan(self, shape: torch.Size) -> Plan:
        """Return the plan for a shape of the input."""
        leading = shape[: len(shape) - 1 - self.dims]
        channels = self.geometry.channels * self.geometry.groups
        if shape[len(leading) : len(leading) + 1] != (channels,) or (self.dims and len(leading) > 1):
            raise ValueError(f"expected {channels} input channels, got a tensor of shape {tuple(shape)}")
        return Plan(self, leading, shape[len(leading) + 1 :])

    def _added(self, input: Tensor, residual: Tensor) -> Tensor:
        """Return the output where the kernel cannot do the addition."""
        bare = copy.copy(self)
        bare.activation, bare.padding, bare._plans = "identity", (), {}
        output = bare(input)
        output = output.add_(residual) if residual.shape == output.shape else output + residual
        return ACTIVATIONS[self.activation](output)


def _geometry(layer: Any) -> tuple[Geometry, str, Sizes]:
    """Return the sizes of a layer, its padding mode, and the padding that `torch.nn.functional.pad` does."""
    weight = layer.weight
    if isinstance(layer, nn.Linear):
        return Geometry(weight.shape[1], weight.shape[0], 1, (1,), (1,), (1,), (0,), (0,)), "zeros", ()
    padding = tuple(layer._reversed_padding_repeated_twice)  # numbers, also for padding="same"
    other = () if layer.padding_mode == "zeros" else padding
    if other:
        padding = (0,) * len(padding)
    before, after = padding[-2::-2], padding[-1::-2]
    sizes = (layer.kernel_size, layer.stride, layer.dilation, before, after)
    return Geometry(weight.shape[1], weight.shape[0], layer.groups, *sizes), layer.padding_mode, other


def _rows(matrix: Tensor, groups: int) -> int:
    """Return the number of output channels in a block, 1 or 4, that makes the product faster."""
    if len(matrix) // groups % _BLOCK:
        return 1
    blocks = int(matrix.view(-1, _BLOCK, matrix.shape[1]).any(1).sum())
    return _BLOCK if blocks * _BLOCK_COST < int(matrix.count_nonzero()) else 1

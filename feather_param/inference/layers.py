"""Layers that compute without the zeros of their weights, on a CPU in float32."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from feather_param.inference.engine import kernel
from feather_param.inference.engine.inputs import CPU, contiguous, readable
from feather_param.inference.engine.layout import Geometry, Sizes
from feather_param.inference.engine.matrix import Matrix
from feather_param.inference.engine.plan import NATIVE_ACTIVATIONS, Plan
from feather_param.inference.engine.plans import Plans
from feather_param.inference.fusing.fuse import ACTIVATIONS, FusedLayer, finished

__all__ = ["SparseLayer"]

_BLOCK = 4  # output channels that may share their columns
_BLOCK_COST = 3.1  # time of a column of such a block, in times of a column of one output channel (measured)

_TRACED = (
    "expected a call that is not traced, got one in torch.jit.trace or torch.export, which would record the output as "
    "a constant; export the dense model"
)


class _Plans(Plans):
    """The newest plans of a layer, for as long as its buffers stay as they are.

    Args:
        buffers: the layer's.

    Attributes:
        matrix: that the buffers are.
    """

    matrix: Matrix

    def __init__(self, buffers: Mapping[str, Tensor | None]) -> None:
        super().__init__()
        self._tensors = [tensor for tensor in buffers.values() if tensor is not None]
        self._versions = [None if tensor.is_inference() else tensor._version for tensor in self._tensors]

    def hold(self, buffers: Mapping[str, Tensor | None]) -> bool:
        """Return whether no buffer was replaced or written in place. Inference tensors do not tell the latter."""
        for tensor, known, version in zip(buffers.values(), self._tensors, self._versions, strict=False):
            if tensor is not known or (version is not None and known._version != version):
                return False
        return bool(self._tensors)


class SparseLayer(nn.Module):
    """Compute the output of a Linear or Conv layer, up to rounding, from the weights that are not zero.

    The weight of each group is a matrix of shape [out channels, in channels * window], in the block sparse row format
    with blocks of 1 x 1, or of 4 x 1 if that is faster (a pattern of such blocks, or few zeros). The kernel multiplies
    it by the inputs (`feather_param.inference.engine.kernel`).

    Shape:
        As those of the layer, in float32 on the CPU. CPU autocast converts inputs of other dtypes to float32.

    Args:
        layer: a Linear, Conv1d, Conv2d or Conv3d, or a `FusedLayer` of one. It is not changed.

    Raises:
        TypeError: the input has another dtype or device.
        ValueError: the input has another number of channels or dimensions, or is smaller than the window.
            Or the buffers do not belong together, for example after loading those of another layer.
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
        dense: Any = layer.layer if isinstance(layer, FusedLayer) else layer
        self.activation = layer.activation if isinstance(layer, FusedLayer) else "identity"
        self.input_dims = layer.dims if isinstance(layer, FusedLayer) else None
        for name in dense.__constants__:  # code may read the sizes of a layer: in_features, stride
            setattr(self, name, getattr(dense, name))
        self.geometry, self._pad_mode, self._pad = _geometry(dense)
        self.dims = 0 if isinstance(dense, nn.Linear) else len(self.geometry.kernel_size)
        with torch.no_grad():
            matrix = dense.weight.detach().flatten(1)
            self.rows = _rows(matrix, self.geometry.groups)
            blocks = matrix.view(len(matrix) // self.rows, self.rows, matrix.shape[1])
            block, column = blocks.any(1).nonzero(as_tuple=True)
            counts = torch.bincount(block, minlength=len(blocks))
            bias = matrix.new_zeros(len(matrix)) if dense.bias is None else dense.bias.detach().clone()
            self.register_buffer("block_start", F.pad(counts.cumsum(0), (1, 0)).int())
            self.register_buffer("columns", column.int())
            self.register_buffer("values", blocks[block, :, column])
            self.register_buffer("bias", bias)
        self._native = self.activation in NATIVE_ACTIVATIONS
        self._plans = _Plans({})

    def extra_repr(self) -> str:
        g = self.geometry
        window = f", window={g.kernel_size}" if self.dims else ""
        nonzeros = int(torch.count_nonzero(self.values))
        return f"{g.channels * g.groups}, {g.out_channels}{window}, nonzeros={nonzeros}, activation={self.activation!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": _Plans({})}

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLayer:
        super()._apply(fn, recurse)
        self._plans = _Plans({})
        return self

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._plans = _Plans({})  # they depend on the columns, which were written in place

    @property
    def weight(self) -> Tensor:
        """The weight as a sparse matrix. Code may read its dtype, shape and device."""
        g = self.geometry
        group = torch.repeat_interleave(torch.diff(self.block_start)) * self.rows // (g.out_channels // g.groups)
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
        if torch.compiler.is_compiling():  # it would compile the kernel's calls, with tensors that have no memory
            return _not_compiled(self, input, residual)
        return self._compute(input, residual)

    def _compute(self, input: Tensor, residual: Tensor | None) -> Tensor:
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            raise RuntimeError(_TRACED)
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self._compute(input.float(), residual if residual is None else residual.float())
        if not readable(input):
            raise TypeError(_expected_floats("input", input))
        if residual is not None and not residual.is_cpu:
            raise TypeError(f"expected a residual on the CPU, got one on {residual.device}; use the dense model")
        if _differentiated(input) or (residual is not None and _differentiated(residual)):
            raise RuntimeError("expected an input without gradient, for inference only; use the dense model")
        if self.input_dims is not None and input.dim() != self.input_dims:
            raise ValueError(f"expected an input of {self.input_dims} dimensions, got {input.dim()}")
        if self._pad:
            input = F.pad(input, self._pad, self._pad_mode)
        x = contiguous(input)
        plan = self._plan(x.shape, self.activation)
        output = torch.empty(plan.shape, dtype=torch.float32, device=CPU)
        if residual is None:
            plan.run(x, output)
        elif self.dims and residual.shape == plan.shape and readable(residual):
            plan.run(x, output, contiguous(residual))
        else:
            self._plan(x.shape, "identity").run(x, output)
            return finished(output, residual.detach(), self.activation)
        return output if self._native else ACTIVATIONS[self.activation](output)

    def _plan(self, shape: torch.Size, activation: str) -> Plan:
        """Return the plan for a shape of the input. All plans go if a buffer was replaced or written."""
        plans = self._plans
        if not plans.hold(self._buffers):
            plans = _Plans(self._buffers)  # before they are read, so that it notices writes from then on
            plans.matrix = self._matrix()
            self._plans = plans
        key = (shape, activation, kernel.available_threads())
        return plans.get(key) or plans.add(key, self._new_plan(plans.matrix, shape, activation))

    def _matrix(self) -> Matrix:
        """Return the matrix that the buffers are now, if they belong together."""
        if not readable(self.values):
            raise TypeError(_expected_floats("weight", self.values))
        g, rows, count = self.geometry, self.rows, len(self.columns)
        forms = (
            (self.block_start, (g.out_channels // rows + 1,), torch.int32),
            (self.columns, (count,), torch.int32),
            (self.values, (count, rows), torch.float32),
            (self.bias, (g.out_channels,), torch.float32),
        )
        if all((tensor.shape, tensor.dtype, tensor.device.type) == (*form, "cpu") for tensor, *form in forms):
            # By numpy, as torch's own threads do not exist in a forked process. The kernel does not check its indices.
            # They are copied, so that nobody can change them after they were checked here.
            starts, columns = self.block_start.numpy().copy(), self.columns.numpy().copy()
            good = (starts[0], starts[-1]) == (0, count) and (starts[1:] >= starts[:-1]).all()
            if good and ((columns >= 0) & (columns < g.channels * math.prod(g.kernel_size))).all():
                values, bias = self.values.numpy(), self.bias.numpy()
                return Matrix(g, self.activation, rows, starts, columns, values, bias)
        raise ValueError(
            "expected buffers that belong together, got damaged or converted ones; convert the model again"
        )

    def _new_plan(self, matrix: Matrix, shape: torch.Size, activation: str) -> Plan:
        leading = shape[: len(shape) - 1 - self.dims]
        channels = self.geometry.channels * self.geometry.groups
        if shape[len(leading) : len(leading) + 1] != (channels,) or (self.dims and len(leading) > 1):
            raise ValueError(f"expected {channels} input channels, got a tensor of shape {tuple(shape)}")
        return Plan(replace(matrix, activation=activation), leading, shape[len(leading) + 1 :])


_disabled: Any = None


def _not_compiled(layer: SparseLayer, input: Tensor, residual: Tensor | None) -> Tensor:
    """Compute the output as it is. The import of `torch.compiler.disable` takes a second."""
    global _disabled
    if _disabled is None:
        _disabled = torch.compiler.disable(SparseLayer._compute)
    return _disabled(layer, input, residual)


def _differentiated(tensor: Tensor) -> bool:
    """Return whether a derivative by a tensor is wanted, in backward or forward mode."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        return True
    return tensor.requires_grad and torch.is_grad_enabled()


def _expected_floats(kind: str, tensor: Tensor) -> str:
    """Return the message for a tensor that the kernel cannot read."""
    layout = "" if tensor.layout == torch.strided else f" {tensor.layout}"
    got = f"{kind} of {tensor.dtype} on {tensor.device}{layout}"
    return f"expected input and weight in float32 on the CPU, got {got}; use the dense model"


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
    blocks = int(matrix.view(len(matrix) // _BLOCK, _BLOCK, matrix.shape[1]).any(1).sum())
    return _BLOCK if blocks * _BLOCK_COST < int(matrix.count_nonzero()) else 1

"""Layers that compute without the zeros of their weights, on a CPU in float32."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feather_param.inference import kernel
from feather_param.inference.layout import Layout, Sizes, output_sizes

__all__ = ["SparseLayer"]

_CHUNK = 2**18  # elements that are copied at once: a megabyte fits in the cache, and needs no fresh memory pages


class SparseLayer(nn.Module):
    """Compute the output of a Linear or Conv layer, up to rounding, from the weights that are not zero.

    The weight is one CSR matrix of shape [out channels, in channels * window], in int32 and float32 buffers. A Linear
    layer is a convolution over no dimensions. There are two methods:

    * ``"csr"``: torch's (MKL's) product of the matrix with the windows of the input, copied side by side (im2col).
    * ``"kernel"``: a sum of slices of the input, see `feather_param.inference.kernel`. Needs numba; without it, the
      layer uses ``"csr"``.

    Shape:
        As those of the layer, in float32 on the CPU. CPU autocast converts inputs of other dtypes to float32.

    Args:
        layer: a Linear, Conv1d, Conv2d or Conv3d. It is not changed. Only the memory of the bias is shared.

    Attributes:
        method: ``"csr"`` or ``"kernel"``.

    Raises:
        TypeError: the input has another dtype or device.
        ValueError: the input has another number of channels or dimensions, or is smaller than the window.
        RuntimeError: the input requires a gradient outside `torch.no_grad`, or the layer is traced.

    Example:
        >>> layer = nn.Conv2d(3, 8, 3, padding=1)
        >>> _ = layer.weight.data.bernoulli_(0.1)
        >>> x = torch.randn(2, 3, 5, 5)
        >>> with torch.no_grad():
        ...     torch.allclose(SparseLayer(layer)(x), layer(x), atol=1e-5)
        True
    """

    crow: Tensor
    col: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.method = "csr"
        self.kernel_size: Sizes = ()
        self.stride: Sizes = ()
        self.dilation: Sizes = ()
        self.padding: Sizes = ()  # before and after, last dimension first, as in F.pad
        self.padding_mode = "zeros"
        groups = 1
        if not isinstance(layer, nn.Linear):
            self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
            self.padding = tuple(layer._reversed_padding_repeated_twice)  # numbers, also for padding="same"
            self.padding_mode = layer.padding_mode
            groups = layer.groups
        weight = layer.weight.detach()
        self.out_channels, self.in_channels = weight.shape[0], weight.shape[1] * groups
        rows = weight.reshape(self.out_channels, -1)
        row, col = rows.nonzero(as_tuple=True)
        group = row // (self.out_channels // groups)  # its input channels follow those of the previous groups
        counts = torch.bincount(row, minlength=self.out_channels)
        self.register_buffer("crow", F.pad(counts.cumsum(0), (1, 0)).int())
        self.register_buffer("col", (col + group * rows.shape[1]).int())
        self.register_buffer("values", rows[row, col])
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self._matrix: tuple[Tensor, Tensor] | None = None  # cached with the values that it was made from
        self._layout: tuple[torch.Size, Layout] | None = None  # cached with the shape of its input

    def extra_repr(self) -> str:
        window = f", window={self.kernel_size}" if self.kernel_size else ""
        sizes = f"{self.in_channels}, {self.out_channels}{window}"
        return f"{sizes}, nonzeros={self.values.numel()}, method={self.method!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrix": None, "_layout": None}  # without the caches

    @property
    def weight(self) -> Tensor:
        """The matrix as a sparse CSR tensor of the buffers. Code may read its dtype, shape and device."""
        cached = self._matrix
        if cached is None or cached[0] is not self.values:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")
                shape = (self.out_channels, self.in_channels * math.prod(self.kernel_size))
                matrix = torch.sparse_csr_tensor(self.crow, self.col, self.values, shape, check_invariants=False)
            cached = self._matrix = self.values, matrix
        return cached[1]

    @torch.compiler.disable  # it cannot trace numba's code
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Tensor
    ) -> Tensor:
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            raise RuntimeError(
                "expected a call that is not traced, got one in torch.jit.trace, which would record the output as a "
                "constant; export the dense model"
            )
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self(input.float())
        for kind, tensor in (("input", input), ("weight", self.values)):
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                got = f"{kind} of {tensor.dtype} on {tensor.device}"
                raise TypeError(f"expected input and weight in float32 on the CPU, got {got}; use the dense model")
        if input.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("expected an input without gradient, for inference only; use the dense model")
        leading = input.shape[: input.dim() - 1 - len(self.kernel_size)]
        if input.shape[len(leading) : len(leading) + 1] != (self.in_channels,) or (
            self.kernel_size and len(leading) > 1
        ):
            raise ValueError(f"expected {self.in_channels} input channels, got a tensor of shape {tuple(input.shape)}")
        x = input.detach().reshape(math.prod(leading), *input.shape[len(leading) :])
        multiply = kernel.compiled() if self.method == "kernel" else None
        copied = math.prod(x.shape[1:]) * (math.prod(self.kernel_size) if multiply is None else 1)  # of each image
        n = max(1, _CHUNK // max(1, copied)) if self.kernel_size else max(1, len(x))  # images at once
        y = self._product(x[:n], multiply)
        if n < len(x):
            first, y = y, y.new_empty(len(x), *y.shape[1:])
            y[:n] = first
            for i in range(n, len(x), n):
                y[i : i + n] = self._product(x[i : i + n], multiply)
        return y.contiguous().view(*leading, *y.shape[1:])

    def _product(self, x: Tensor, multiply: Any) -> Tensor:
        """Return the output, [batch, out channels, *out].

        Args:
            x: the input, [batch, in channels, *sizes].
            multiply: the compiled kernel, or None for CSR.
        """
        padding = self.padding
        if any(padding) and (multiply is None or self.padding_mode != "zeros"):
            x = F.pad(x, padding, "constant" if self.padding_mode == "zeros" else self.padding_mode)
            padding = (0,) * len(padding)
        y = self._by_csr(x) if multiply is None else self._by_kernel(x, padding, multiply)
        return y.transpose(0, 1)

    def _by_csr(self, x: Tensor) -> Tensor:
        """Return the matrix times the windows of a padded input (im2col), [out channels, batch, *out]."""
        out = output_sizes(x.shape[2:], self.kernel_size, self.stride, self.dilation)
        batch, channel, *step = x.stride()
        inside = [a * b for a, b in zip(step, self.dilation, strict=True)]
        between = [a * b for a, b in zip(step, self.stride, strict=True)]
        windows = x.as_strided((x.shape[1], *self.kernel_size, len(x), *out), (channel, *inside, batch, *between))
        columns = windows.reshape(x.shape[1] * math.prod(self.kernel_size), -1)
        vector = columns.shape[1] == 1  # MKL's product with a vector is faster
        y = (self.weight @ columns[:, 0])[:, None] if vector else self.weight @ columns
        if self.bias is not None:
            y += self.bias[:, None]
        return y.view(self.out_channels, len(x), *out)

    def _by_kernel(self, x: Tensor, padding: Sizes, multiply: Any) -> Tensor:
        """Return a sum of one slice of x for each weight, [out channels, batch, *out]."""
        cached = self._layout  # read once, because other threads may replace it
        if cached is None or cached[0] != x.shape:
            layout = Layout.of(x.shape, self.kernel_size, self.stride, self.dilation, padding)
            cached = self._layout = x.shape, layout
        layout, x = cached[1], x.transpose(0, 1)
        if not any(padding) and set(self.stride) <= {1}:
            grid = x.contiguous()  # the input has the layout already; a batch of one image is not copied
        else:
            grid = x.new_zeros(layout.grid)
            for to, source in layout.copies:
                grid[to] = x[source]
        y = x.new_empty(self.out_channels, *layout.grid[2:])
        bias = x.new_zeros(self.out_channels) if self.bias is None else self.bias
        tensors = (self.crow, self.col, self.values, layout.starts, grid.view(-1), bias, y.view(self.out_channels, -1))
        multiply(*(tensor.numpy() for tensor in tensors), layout.width)
        return y[(slice(None), slice(None), *(slice(n) for n in layout.out))]

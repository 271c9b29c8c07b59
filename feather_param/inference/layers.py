"""A layer that computes with the non-zero weights alone, on a CPU in float32."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from feather_param.inference import kernel as sparse_kernel

Sizes = tuple[int, ...]

_COPIED = 2**18  # elements that are copied at once: a megabyte stays in the cache, and needs no fresh pages


class SparseLayer(nn.Module):
    """Compute what a Linear or Conv layer computes, up to rounding, from the weights that are not zero.

    The weight is one matrix in CSR form of shape [out channels, in channels * window], in int32 and float32 buffers; a
    Linear layer is a convolution over no dimensions. It multiplies in one of two ways:

    * ``"csr"``: torch's product (MKL's) of the matrix with the windows, copied side by side as columns.
    * ``"kernel"``: a sum of slices of the input, see `sparse_kernel`; as ``"csr"`` where numba is not installed.

    Shape:
        As the layer's, float32 on the CPU. Under CPU autocast, inputs of other dtypes are taken as float32.

    Args:
        layer: a Linear, Conv1d, Conv2d or Conv3d. It is not touched, and shares nothing but the bias.

    Attributes:
        way: ``"csr"`` or ``"kernel"``.

    Raises:
        TypeError: forward got another dtype or device.
        RuntimeError: forward got an input that requires a gradient, outside `torch.no_grad`.

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
        self.way = "csr"
        self.kernel: Sizes = ()
        self.stride: Sizes = ()
        self.dilation: Sizes = ()
        self.ends: Sizes = ()  # what is padded before and after, the last dimension first, as F.pad takes it
        self.padding_mode = "zeros"
        groups = 1
        if not isinstance(layer, nn.Linear):
            self.kernel, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
            self.ends = tuple(layer._reversed_padding_repeated_twice)  # in numbers also where padding is "same"
            self.padding_mode = layer.padding_mode
            groups = layer.groups
        weight = layer.weight.detach()
        self.out_channels, self.in_channels = weight.shape[0], weight.shape[1] * groups
        rows = weight.reshape(self.out_channels, -1)
        row, col = rows.nonzero(as_tuple=True)
        group = row // (self.out_channels // groups)  # its input channels come after those of the groups before
        counts = torch.bincount(row, minlength=self.out_channels)
        self.register_buffer("crow", F.pad(counts.cumsum(0), (1, 0)).int())
        self.register_buffer("col", (col + group * rows.shape[1]).int())
        self.register_buffer("values", rows[row, col])
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self._matrix: tuple[Tensor, Tensor] | None = None  # made of these values
        self._layout: tuple[torch.Size, _Layout] | None = None

    def extra_repr(self) -> str:
        window = f", window={self.kernel}" if self.kernel else ""
        return f"{self.in_channels}, {self.out_channels}{window}, nonzeros={self.values.numel()}, way={self.way!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrix": None, "_layout": None}  # what is made when it is needed

    @property
    def weight(self) -> Tensor:
        """The matrix as a sparse CSR tensor on the buffers; code that asks a weight for its dtype goes on to work."""
        made = self._matrix
        if made is None or made[0] is not self.values:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")
                shape = (self.out_channels, self.in_channels * math.prod(self.kernel))
                matrix = torch.sparse_csr_tensor(self.crow, self.col, self.values, shape, check_invariants=False)
            made = self._matrix = self.values, matrix
        return made[1]

    @torch.compiler.disable  # which would follow it into numba
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Tensor
    ) -> Tensor:
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            raise RuntimeError("expected to compute, got traced: a trace keeps the numbers; export the dense model")
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self(input.float())
        for kind, tensor in (("input", input), ("weight", self.values)):
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
                got = f"{kind} of {tensor.dtype} on {tensor.device}"
                raise TypeError(f"expected input and weight in float32 on the CPU, got {got}; use the dense model")
        if input.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("expected an input without gradient, for inference only; use the dense model")
        leading = input.shape[: input.dim() - 1 - len(self.kernel)]
        if input.shape[len(leading) : len(leading) + 1] != (self.in_channels,) or (self.kernel and len(leading) > 1):
            raise ValueError(f"expected {self.in_channels} input channels, got a tensor of shape {tuple(input.shape)}")
        x = input.detach().reshape(math.prod(leading), *input.shape[len(leading) :])
        multiply = sparse_kernel.compiled() if self.way == "kernel" else None
        copied = math.prod(x.shape[1:]) * (math.prod(self.kernel) if multiply is None else 1)  # for each image
        n = max(1, _COPIED // max(1, copied)) if self.kernel else max(1, len(x))
        y = self._product(x[:n], multiply)
        if n < len(x):
            first, y = y, y.new_empty(len(x), *y.shape[1:])
            y[:n] = first
            for i in range(n, len(x), n):
                y[i : i + n] = self._product(x[i : i + n], multiply)
        return y.contiguous().view(*leading, *y.shape[1:])

    def _product(self, x: Tensor, multiply: Any) -> Tensor:
        """Return [batch, out channels, *out], by the compiled kernel or, where it is None, by CSR."""
        ends = self.ends
        if any(ends) and (multiply is None or self.padding_mode != "zeros"):
            x = F.pad(x, ends, "constant" if self.padding_mode == "zeros" else self.padding_mode)
            ends = (0,) * len(ends)
        y = self._by_columns(x) if multiply is None else self._by_slices(x, ends, multiply)
        return y.transpose(0, 1)

    def _by_columns(self, x: Tensor) -> Tensor:
        """Return [out channels, batch, *out]: the matrix times the windows of x, which are copied side by side."""
        out = _out_sizes(x.shape[2:], self.kernel, self.stride, self.dilation)
        batch, channel, *place = x.stride()
        inside = [a * b for a, b in zip(place, self.dilation, strict=True)]
        between = [a * b for a, b in zip(place, self.stride, strict=True)]
        windows = x.as_strided((x.shape[1], *self.kernel, len(x), *out), (channel, *inside, batch, *between))
        columns = windows.reshape(x.shape[1] * math.prod(self.kernel), -1)
        vector = columns.shape[1] == 1  # MKL is faster when it is told so
        y = (self.weight @ columns[:, 0])[:, None] if vector else self.weight @ columns
        if self.bias is not None:
            y += self.bias[:, None]
        return y.view(self.out_channels, len(x), *out)

    def _by_slices(self, x: Tensor, ends: Sizes, multiply: Any) -> Tensor:
        """Return [out channels, batch, *out]: for each weight a slice of x, which is copied once with its padding."""
        made = self._layout  # once read, as other threads may come with other sizes
        if made is None or made[0] != x.shape:
            made = self._layout = x.shape, _Layout.of(x.shape, self.kernel, self.stride, self.dilation, ends)
        layout, x = made[1], x.transpose(0, 1)
        if not any(ends) and set(self.stride) <= {1}:
            grid = x.contiguous()  # the input is laid out so: no copy where the batch is one image
        else:
            grid = x.new_zeros(layout.grid)
            for to, source in layout.copies:
                grid[to] = x[source]
        y = x.new_empty(self.out_channels, *layout.grid[2:])
        bias = x.new_zeros(self.out_channels) if self.bias is None else self.bias
        tensors = (self.crow, self.col, self.values, layout.starts, grid.view(-1), bias, y.view(self.out_channels, -1))
        multiply(*(tensor.numpy() for tensor in tensors), layout.width)
        return y[(slice(None), slice(None), *(slice(n) for n in layout.out))]


@dataclass(frozen=True)
class _Layout:
    """Where an input lies in flat memory for `sparse_kernel`, which knows no strides.

    With stride s, windows move by s pixels. The grid therefore keeps pixels of the same remainder modulo s together, as
    an image each, so that in there windows move by one again.
    """

    grid: Sizes  # [remainders, in channels, batch, *sizes]
    # Of what is copied, the index into the grid and the index into the input, channels first.
    copies: list[tuple[tuple[Any, ...], tuple[Any, ...]]]
    starts: Tensor  # where in the grid the first window's element begins, of each column of the matrix, int64
    out: Sizes  # of the output, which are the first ones of the grid's
    width: int  # from the first output to the last one in the grid

    @staticmethod
    def of(shape: Sizes, kernel: Sizes, stride: Sizes, dilation: Sizes, ends: Sizes) -> _Layout:
        """Plan for an input of shape [batch, in channels, *sizes]."""
        batch, channels, *sizes = shape
        before = [ends[i] for i in range(len(ends) - 2, -1, -2)]
        after = [ends[i] for i in range(len(ends) - 1, -1, -2)]
        padded = tuple(a + n + b for a, n, b in zip(before, sizes, after, strict=True))
        out = _out_sizes(padded, kernel, stride, dilation)
        extents = [n + d * (k - 1) // s for n, k, s, d in zip(out, kernel, stride, dilation, strict=True)]
        taps = [[d * i for i in range(k)] for k, d in zip(kernel, dilation, strict=True)]
        remainders = [sorted({tap % s for tap in some}) for some, s in zip(taps, stride, strict=True)]
        images = {image: i for i, image in enumerate(itertools.product(*remainders))}
        grid = (len(images), channels, batch, *extents)
        steps = torch.empty(grid, device="meta").stride()
        copies = []
        for image, i in images.items():
            to: list[Any] = [i, slice(None), slice(None)]
            source: list[Any] = [slice(None), slice(None)]
            for remainder, s, pad, size, extent in zip(image, stride, before, sizes, extents, strict=True):
                begin = max(0, -((remainder - pad) // s))  # the first place in the image that is not padding
                first = remainder - pad + s * begin
                n = max(0, min(len(range(first, size, s)), extent - begin))
                to.append(slice(begin, begin + n))
                source.append(slice(first, first + s * n, s))
            copies.append((tuple(to), tuple(source)))
        windows = [
            steps[0] * images[tuple(tap % s for tap, s in zip(place, stride, strict=True))]
            + sum(tap // s * step for tap, s, step in zip(place, stride, steps[3:], strict=True))
            for place in itertools.product(*taps)
        ]
        starts = torch.arange(channels)[:, None] * steps[1] + torch.tensor(windows)
        last = [batch - 1, *(n - 1 for n in out)]
        width = 1 + sum(a * step for a, step in zip(last, steps[2:], strict=True))
        return _Layout(grid, copies, starts.flatten(), out, width)


def _out_sizes(sizes: Sizes, kernel: Sizes, stride: Sizes, dilation: Sizes) -> Sizes:
    spans = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    if any(n < span for n, span in zip(sizes, spans, strict=True)):
        raise ValueError(f"expected a padded input of at least the window's size {spans}, got {tuple(sizes)}")
    return tuple((n - span) // s + 1 for n, span, s in zip(sizes, spans, stride, strict=True))

"""Lay an input out in flat memory, such that moving a convolution's window by one step moves each index by one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The grid into which an input is copied for `kernel.sum_of_slices`, which takes no strides.

    A window of stride s moves by s pixels. The grid therefore groups the pixels into phases: those of equal index
    modulo s, in each dimension. In a phase, the window moves by one pixel.
    """

    grid: Sizes  # [phases, in channels, batch, *sizes]
    # Of each phase, the index into the grid and the index into the input, channels first.
    copies: list[tuple[tuple[Any, ...], tuple[Any, ...]]]
    # Of each column of the matrix, the flat index in the grid of its element in the first window, int64.
    starts: Tensor
    out: Sizes  # sizes of the output, which begins at index 0 of the grid's sizes
    width: int  # flat distance in the grid from the first output to the last, plus 1

    @staticmethod
    def of(shape: Sizes, kernel_size: Sizes, stride: Sizes, dilation: Sizes, padding: Sizes) -> Layout:
        """Return the layout of an input.

        Args:
            shape: of the input, [batch, in channels, *sizes].
            kernel_size: of the convolution, like ``stride`` and ``dilation``.
            padding: zeros before and after, last dimension first, as in `torch.nn.functional.pad`.
        """
        batch, channels, *sizes = shape
        before = [padding[i] for i in range(len(padding) - 2, -1, -2)]
        after = [padding[i] for i in range(len(padding) - 1, -1, -2)]
        padded = tuple(a + n + b for a, n, b in zip(before, sizes, after, strict=True))
        out = output_sizes(padded, kernel_size, stride, dilation)
        extents = [n + d * (k - 1) // s for n, k, s, d in zip(out, kernel_size, stride, dilation, strict=True)]
        taps = [[d * i for i in range(k)] for k, d in zip(kernel_size, dilation, strict=True)]  # offsets in the window
        remainders = [sorted({tap % s for tap in some}) for some, s in zip(taps, stride, strict=True)]
        phases = {phase: i for i, phase in enumerate(itertools.product(*remainders))}
        grid = (len(phases), channels, batch, *extents)
        steps = torch.empty(grid, device="meta").stride()
        copies = []
        for phase, i in phases.items():
            to: list[Any] = [i, slice(None), slice(None)]
            source: list[Any] = [slice(None), slice(None)]
            for remainder, s, pad, size, extent in zip(phase, stride, before, sizes, extents, strict=True):
                begin = max(0, -((remainder - pad) // s))  # first index in the phase that is not padding
                first = remainder - pad + s * begin
                n = max(0, min(len(range(first, size, s)), extent - begin))
                to.append(slice(begin, begin + n))
                source.append(slice(first, first + s * n, s))
            copies.append((tuple(to), tuple(source)))
        window = [
            steps[0] * phases[tuple(tap % s for tap, s in zip(offsets, stride, strict=True))]
            + sum(tap // s * step for tap, s, step in zip(offsets, stride, steps[3:], strict=True))
            for offsets in itertools.product(*taps)
        ]
        starts = torch.arange(channels)[:, None] * steps[1] + torch.tensor(window)
        last = [batch - 1, *(n - 1 for n in out)]
        width = 1 + sum(a * step for a, step in zip(last, steps[2:], strict=True))
        return Layout(grid, copies, starts.flatten(), out, width)


def output_sizes(sizes: Sizes, kernel_size: Sizes, stride: Sizes, dilation: Sizes) -> Sizes:
    """Return the output sizes of a convolution for the sizes of a padded input.

    Raises:
        ValueError: the input is smaller than the window.
    """
    spans = tuple(d * (k - 1) + 1 for k, d in zip(kernel_size, dilation, strict=True))
    if any(n < span for n, span in zip(sizes, spans, strict=True)):
        raise ValueError(f"expected a padded input of at least the window's size {spans}, got {tuple(sizes)}")
    return tuple((n - span) // s + 1 for n, span, s in zip(sizes, spans, stride, strict=True))

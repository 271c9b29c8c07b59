"""Layers of every kind, with the shape of an input."""

from __future__ import annotations

from hypothesis import strategies as st
from torch import nn

LAYERS = {
    "linear": (nn.Linear(20, 8), (3, 20)),
    "linear, one token": (nn.Linear(20, 8), (1, 20)),
    "linear, no token": (nn.Linear(20, 8), (0, 20)),
    "linear, no bias": (nn.Linear(20, 8, bias=False), (40, 20)),
    "linear, many tokens": (nn.Linear(20, 8), (150, 20)),
    "linear, whole vectors": (nn.Linear(32, 16), (64, 32)),
    "linear, many channels": (nn.Linear(2049, 4), (33, 2049)),
    "linear, one channel": (nn.Linear(1, 4), (17, 1)),
    "conv1d": (nn.Conv1d(6, 8, 3), (2, 6, 11)),
    "conv1d, causal dilation": (nn.Conv1d(6, 8, 3, padding=8, dilation=4), (2, 6, 11)),
    "conv1d, long": (nn.Conv1d(4, 8, 5, stride=4, padding=2), (1, 4, 1000)),
    "conv2d": (nn.Conv2d(6, 8, 3), (2, 6, 9, 7)),
    "conv2d, 1x1": (nn.Conv2d(6, 8, 1), (1, 6, 9, 7)),
    "conv2d, 1x1, batch": (nn.Conv2d(6, 8, 1, bias=False), (3, 6, 9, 7)),
    "conv2d, 1x1, aligned": (nn.Conv2d(6, 8, 1), (2, 6, 8, 16)),
    "conv2d, 1x1, small": (nn.Conv2d(6, 8, 1), (5, 6, 3, 2)),
    "conv2d, 1x1, one pixel": (nn.Conv2d(6, 8, 1), (20, 6, 1, 1)),
    "conv2d, 1x1, 17 pixels": (nn.Conv2d(6, 8, 1), (2, 6, 1, 17)),
    "conv2d, 1x1, stride 2": (nn.Conv2d(6, 8, 1, stride=2), (2, 6, 9, 7)),
    "conv2d, 1x1, padding": (nn.Conv2d(6, 8, 1, padding=2), (1, 6, 9, 7)),
    "conv2d, first of a ResNet": (nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), (1, 3, 40, 42)),
    "conv2d, stride 2, wide": (nn.Conv2d(3, 8, 3, stride=2, padding=1), (1, 3, 5, 70)),
    "conv2d, stride beyond the window": (nn.Conv2d(6, 8, 2, stride=3, padding=1), (2, 6, 9, 7)),
    "conv2d, unequal in both directions": (nn.Conv2d(6, 8, (3, 2), (1, 2), (2, 0), (2, 1)), (2, 6, 9, 7)),
    "conv2d, padding larger than the image": (nn.Conv2d(6, 8, 3, padding=5), (1, 6, 2, 1)),
    "conv2d, padding wider than two vectors": (nn.Conv2d(2, 4, 3, padding=40), (1, 2, 3, 3)),
    "conv2d, same": (nn.Conv2d(6, 8, 4, padding="same", dilation=2), (2, 6, 9, 7)),
    "conv2d, window of the image": (nn.Conv2d(6, 8, (9, 7)), (3, 6, 9, 7)),
    "conv2d, groups": (nn.Conv2d(6, 8, 3, padding=1, groups=2), (2, 6, 9, 7)),
    "conv2d, groups, 1x1": (nn.Conv2d(6, 8, 1, groups=2), (1, 6, 9, 7)),
    "conv2d, depthwise": (nn.Conv2d(6, 12, 3, padding=1, stride=2, groups=6), (2, 6, 9, 7)),
    "conv2d, no image": (nn.Conv2d(6, 8, 3, padding=1), (0, 6, 9, 7)),
    "conv2d, large": (nn.Conv2d(3, 4, 3, padding=1), (1, 3, 70, 90)),
    "conv3d": (nn.Conv3d(4, 8, 3, padding=1, stride=(1, 2, 2)), (2, 4, 5, 6, 7)),
    "conv3d, 1x1x1": (nn.Conv3d(4, 8, 1), (2, 4, 3, 2, 2)),
}


def rows_of(layer):
    """Return the numbers of rows that a block of the layer's matrix may have."""
    return (1, 4) if layer.weight.shape[0] // getattr(layer, "groups", 1) % 4 == 0 else (1,)


def drawn_convolution(data, dims, out_channels, most):
    """Return a convolution of 4 channels and the sizes of an image for it, drawn by hypothesis.

    The sizes are at most so much larger than the smallest that it takes.
    """
    numbers = lambda low, high: data.draw(st.tuples(*[st.integers(low, high)] * dims))  # noqa: E731
    window, stride, padding, dilation = numbers(1, 4), numbers(1, 4), numbers(0, 4), numbers(1, 3)
    groups = data.draw(st.sampled_from([1, 2, 4]))
    smallest = (max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(window, dilation, padding, strict=True))
    sizes = [low + more for low, more in zip(smallest, numbers(0, most), strict=True)]
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return kind(4, out_channels, window, stride, padding, dilation, groups), sizes

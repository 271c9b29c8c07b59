"""DenseNet-BC for small images (Huang et al. 2017), with 40 layers and growth rate 24."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs._init import init_he

__all__ = ["DenseNet", "densenet"]

_GROWTH = 24
_BLOCKS = 3
_LAYERS = 6  # per block; 40 layers = stem + 3 blocks * 6 layers * 2 convolutions + 2 transitions + classifier
_BOTTLENECK = 4  # output channels of the 1x1 convolution, in multiples of the growth rate
_REDUCTION = 0.5  # of the channels, at each transition


class _Layer(nn.Module):
    """A 1x1 and a 3x3 convolution. The output is the channels of the input and those of the convolutions."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, _BOTTLENECK * _GROWTH, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(_BOTTLENECK * _GROWTH)
        self.conv2 = nn.Conv2d(_BOTTLENECK * _GROWTH, _GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([x, self.conv2(F.relu(self.bn2(y)))], dim=1)


class _Transition(nn.Module):
    """A 1x1 convolution to fewer channels, and a mean that halves the resolution."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """A stem, three dense blocks with transitions between them, the mean over the image, and a classifier.

    Shape:
        [batch, in_channels, height, width] to [batch, num_classes].
    """

    def __init__(self, num_classes: int = 100, in_channels: int = 3) -> None:
        super().__init__()
        channels = 2 * _GROWTH
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        layers: list[nn.Module] = []
        for block in range(_BLOCKS):
            if block:
                reduced = int(_REDUCTION * channels)
                layers.append(_Transition(channels, reduced))
                channels = reduced
            for _ in range(_LAYERS):
                layers.append(_Layer(channels))
                channels += _GROWTH
        self.layers = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.layers(self.conv(x))))
        return self.fc(y.mean(dim=(2, 3)))


def densenet(num_classes: int = 100, in_channels: int = 3) -> DenseNet:
    """Return a DenseNet-BC of depth 40 and growth rate 24: 714,196 parameters for 100 classes of colour images."""
    return DenseNet(num_classes, in_channels)

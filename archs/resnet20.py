"""ResNet-20 for small images (He et al. 2016, "Deep Residual Learning"), by default twice as wide as in the paper."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from archs._init import init_he

__all__ = ["ResNet20", "resnet20"]

_BLOCKS = 3  # per width; 20 layers = stem + 3 widths * 3 blocks * 2 convolutions + classifier


class _Block(nn.Module):
    """Two 3x3 convolutions with a shortcut, which is a 1x1 convolution if the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet20(nn.Module):
    """A stem, three stages of three blocks at 1, 1/2 and 1/4 of the resolution, the mean, and a classifier.

    Args:
        num_classes: number of outputs.
        in_channels: number of channels of an image.
        width: number of channels of the first stage. The other stages have two and four times this number.

    Shape:
        [batch, in_channels, height, width] to [batch, num_classes].
    """

    def __init__(self, num_classes: int = 100, in_channels: int = 3, width: int = 32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        channels = width
        for stage in (width, 2 * width, 4 * width):
            for _ in range(_BLOCKS):
                blocks.append(_Block(channels, stage, stride=1 if stage == channels else 2))
                channels = stage
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.fc(y.mean(dim=(2, 3)))


def resnet20(num_classes: int = 100, in_channels: int = 3, width: int = 32) -> ResNet20:
    """Return a ResNet-20 of widths 32, 64, 128: 1,096,196 parameters for 100 classes of colour images."""
    return ResNet20(num_classes, in_channels, width)

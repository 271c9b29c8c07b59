"""MobileNetV1 for small images (Howard et al. 2017), with depthwise separable convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from archs._init import init_he

__all__ = ["MobileNetV1", "mobilenet_v1"]

_STEM = 32
# (output channels, stride) of each depthwise separable convolution of a network of width 1: table 1 of the paper.
_LAYERS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


class _Separable(nn.Module):
    """A 3x3 convolution of each channel, then a 1x1 convolution over all channels."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False
        )
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.pointwise = nn.Conv2d(in_channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.depthwise(x)))
        return F.relu(self.bn2(self.pointwise(y)))


class MobileNetV1(nn.Module):
    """A stem of stride 1 for small images, thirteen separable convolutions, the mean over the image, and a classifier.

    Args:
        num_classes: number of outputs.
        in_channels: number of channels of an image.
        width: multiplier of the number of channels of each layer, which is rounded (section 3.3 of the paper).

    Shape:
        [batch, in_channels, height, width] to [batch, num_classes].

    Raises:
        ValueError: a layer would have no channels.
    """

    def __init__(self, num_classes: int = 100, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        channels = round(width * _STEM)
        if channels < 1:
            raise ValueError(f"expected width * {_STEM} channels to be 1 or more, got width={width}; take a larger one")
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        layers: list[nn.Module] = []
        for at_width_1, stride in _LAYERS:
            outputs = round(width * at_width_1)
            layers.append(_Separable(channels, outputs, stride))
            channels = outputs
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)
        init_he(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(F.relu(self.bn(self.conv(x))))
        return self.fc(y.mean(dim=(2, 3)))


def mobilenet_v1(num_classes: int = 100, in_channels: int = 3, width: float = 1.0) -> MobileNetV1:
    """Return a MobileNetV1, by default of width 1: 3,315,428 parameters for 100 classes of colour images."""
    return MobileNetV1(num_classes, in_channels, width)

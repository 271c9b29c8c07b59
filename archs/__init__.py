"""Networks for small images, as plain modules without any sparsity."""

from archs.densenet import densenet as densenet
from archs.mobilenet_v1 import mobilenet_v1 as mobilenet_v1
from archs.resnet20 import resnet20 as resnet20

__all__ = ["densenet", "mobilenet_v1", "resnet20"]

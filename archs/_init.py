"""The initialisation of all networks."""

from __future__ import annotations

from torch import nn

__all__ = ["init_he"]


def init_he(model: nn.Module) -> None:
    """Initialise convolutions for ReLU by their fan-out (He et al. 2015), and their biases with zero.

    Linear layers and batch norms keep the defaults of PyTorch.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

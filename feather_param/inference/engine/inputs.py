"""What tensors the kernel can read and write."""

from __future__ import annotations

import torch
from torch import Tensor

CPU = torch.device("cpu")
"""For new tensors, as torch's default device may be another."""


def readable(tensor: Tensor) -> bool:
    """Return whether the kernel can read a tensor."""
    return tensor.dtype is torch.float32 and tensor.is_cpu and tensor.layout is torch.strided


def contiguous(tensor: Tensor) -> Tensor:
    """Return a tensor with its elements in memory in order, and no pending negation."""
    return tensor if tensor.is_contiguous() and not tensor.is_neg() else tensor.detach().resolve_neg().contiguous()

"""The bits of a tensor's elements, and whether it has any."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def elements_of(tensor: Tensor) -> NDArray[Any]:
    """Return the bits of a tensor's elements, in row-major order, as little-endian unsigned integers [n].

    A complex number has two elements.
    """
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    width = tensor.element_size()
    bits = tensor.view(_SAME_SIZE[width]).contiguous().reshape(-1).numpy()
    return bits.view(f"u{width}").astype(f"<u{width}", copy=False)


def has_memory(tensor: Tensor) -> bool:
    """Return whether a tensor has memory for its elements."""
    try:
        return not tensor.is_meta and (not tensor.numel() or tensor.untyped_storage().data_ptr() != 0)
    except RuntimeError:  # torch raises it for a tensor without storage
        return False

"""Find tied tensors: entries of a state_dict that are the same tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for each name the first name of the same tensor.

    Two tensors are the same if they have the same memory, dtype, shape, strides and conjugate and negative bits. All of
    them must be alive, because the addresses of their memory are compared. Tensors without elements are never the same.

    Example:
        >>> weight = torch.ones(2)
        >>> first_names({"embedding": weight, "head": weight, "other": torch.ones(2)})
        {'embedding': 'embedding', 'head': 'embedding', 'other': 'other'}
    """
    first: dict[Any, str] = {}
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        view = (tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, *view) if tensor.numel() else name
        found[name] = first.setdefault(key, name)
    return found


def untied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each tensor once, by its first name."""
    return {name: tensors[name] for name, first in first_names(tensors).items() if name == first}

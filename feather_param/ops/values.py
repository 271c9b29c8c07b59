"""Tensors without values: lazy, on the meta device, made in a FakeTensorMode, or with freed memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn.parameter import is_lazy

from feather_param.ops.distributed import shard
from feather_param.utils.text import printable


def why_without_values(tensor: Tensor) -> str:
    """Return why a tensor has no values, or "" if it has some.

    Example:
        >>> why_without_values(torch.empty(2, device="meta")), why_without_values(torch.ones(2))
        ('on the meta device', '')
    """
    if is_lazy(tensor):
        return "not initialised yet (lazy)"
    part = shard(tensor)
    if isinstance(part, FakeTensor):
        return "as a FakeTensor"
    if part.is_meta:
        return "on the meta device"
    plain = type(part.data) is Tensor and part.layout == torch.strided and part.device.type in ("cpu", "cuda")
    freed = plain and part.numel() and not part.untyped_storage().size()  # torch would read at the address 0
    return "with freed memory" if freed else ""


def without_values_if_one_is(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return weights on the meta device if one of them is there: magnitudes cannot be compared then."""
    if not any(weight.is_meta for weight in weights.values()):
        return weights
    return {name: weight.to("meta") for name, weight in weights.items()}


def require_values(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights without values.

    Args:
        tensors: pairs of a name and a tensor.

    Raises:
        RuntimeError: a tensor has no values.
    """
    for name, tensor in tensors:
        if why := why_without_values(tensor):
            raise RuntimeError(
                f"expected weights with values, got {printable(name)} {why}; load them first, with "
                "load_state_dict(state, assign=True), or call to_empty(device=...) and initialise them"
            )

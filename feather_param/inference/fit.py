"""Which Linear and Conv layers may be replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from feather_param.selection.weights import LINEAR_AND_CONV

_FORWARDS = {name: {getattr(layer, name, None) for layer in LINEAR_AND_CONV} for name in ("forward", "_conv_forward")}


def unfit(layer: Any) -> str:
    """Return the reason why a Linear or Conv layer cannot be replaced, or an empty string."""
    if is_parametrized(layer):
        return "its weight is parametrized"
    if type(layer.weight) not in (Tensor, nn.Parameter):
        return f"its weight is of type {type(layer.weight).__name__}"
    if layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
        got = f"its weight is {str(layer.weight.dtype).removeprefix('torch.')} on {layer.weight.device}"
        return f"{got}; call model.float()" if layer.weight.device.type == "cpu" else got
    if "forward" in vars(layer) or any(getattr(type(layer), n, None) not in own for n, own in _FORWARDS.items()):
        return "its forward is not torch's own"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has hooks"
    return ""

"""Fold batch norms into the weight and bias of a layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_MODULES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
_FLOAT32_ON_CPU = torch.float32, "cpu"


class Norm(NamedTuple):
    """A batch norm in eval mode."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, module: Any) -> Norm | None:
        """Return the values of a BatchNorm module whose forward is torch's own, or None."""
        own = isinstance(module, _MODULES) and type(module).forward in _FORWARDS
        if not own or module.training:
            return None
        return cls.checked(module.running_mean, module.running_var, module.weight, module.bias, module.eps)

    @classmethod
    def checked(cls, mean: Any, var: Any, weight: Any, bias: Any, eps: Any) -> Norm | None:
        """Return a batch norm if its values are float32 tensors on the CPU, else None."""
        tensors = [mean, var, *(tensor for tensor in (weight, bias) if tensor is not None)]
        for tensor in tensors:
            if type(tensor) not in (Tensor, nn.Parameter) or (tensor.dtype, tensor.device.type) != _FLOAT32_ON_CPU:
                return None
        return cls(mean, var, weight, bias, eps) if isinstance(eps, float) else None


def folded(layer: Any, norms: Sequence[Norm]) -> Any:
    """Return a copy of a layer with batch norms folded into it, or None if the result is not finite."""
    weight = layer.weight.detach().double()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()
    for norm in norms:
        if len(norm.mean) != len(weight):
            return None
        scale = (norm.var.detach().double() + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight.detach().double()
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        bias = (bias - norm.mean.double()) * scale + (0.0 if norm.bias is None else norm.bias.detach().double())
    values = {"weight": weight.float(), "bias": bias.float()}
    if not all(math.isfinite(float(value.abs().sum())) for value in values.values()):
        return None
    new = copy.copy(layer)
    new._parameters = layer._parameters.copy()
    for name, value in values.items():
        new._parameters[name] = nn.Parameter(value, requires_grad=False)
    return new

"""2:4 sparsity, which GPUs multiply faster: check it, and convert weights without losing any."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from feather_param.utils.text import printable

# Multiples that both backends of torch (cuSPARSELt and CUTLASS) need for these dtypes.
_ROWS, _COLUMNS = 32, 64
_DTYPES = (torch.float16, torch.bfloat16)

_FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def is_semi_structured(tensor_or_model: Tensor | nn.Module) -> bool:
    """Return whether at most 2 of every 4 consecutive elements along the last dimension are non-zero.

    The last dimension of a Linear weight is its input dimension, along which the GPU multiplies. A tensor whose last
    dimension is no multiple of 4 is not 2:4. NaN is non-zero, -0.0 is zero. For a model, all Linear weights are
    checked, as the forward pass uses them. A model without Linear layers is not 2:4.

    A rate of 0.5 is necessary but not sufficient: pruning by magnitude keeps 3 elements in some group of 4 even at high
    rates.

    Raises:
        TypeError: the argument is neither a tensor nor a model.

    Example:
        >>> is_semi_structured(torch.tensor([[0.0, 1.0, 2.0, 0.0, 3.0, 0.0, 0.0, 0.0]]))
        True
        >>> is_semi_structured(torch.tensor([[0.0, 1.0, 2.0, 0.0, 3.0, 4.0, 5.0, 0.0]]))
        False
    """
    if isinstance(tensor_or_model, nn.Module):
        layers = _linear_layers(tensor_or_model)
        return bool(layers) and all(is_semi_structured(layer.weight) for layer in layers.values())
    if not isinstance(tensor_or_model, Tensor):
        raise TypeError(f"expected a tensor or an nn.Module, got {type(tensor_or_model).__name__}")
    if isinstance(tensor_or_model, SparseSemiStructuredTensor):
        return True
    return _overfull(tensor_or_model) == 0


def to_semi_structured(model: nn.Module) -> list[str]:
    """Convert the Linear weights of a model to torch's 2:4 tensors, in place, for inference on a GPU.

    `torch.sparse.to_sparse_semi_structured` keeps two elements of each group of 4 and silently drops the others. This
    function refuses a weight that would lose elements, or that the kernels do not support. It converts all Linear
    layers or none. To leave some dense (a head with few classes), convert the submodules around them one by one. Other
    layers are not changed, including convolutions, for which torch has no 2:4 kernel.

    Save the model first: converted weights load with neither ``weights_only=True`` nor safetensors. They take about
    9/16 of the dense bytes and require no gradient. torch warns once that its 2:4 tensors are a prototype.

    An error leaves the model unchanged.

    Args:
        model: a plain model (after `desparsify`) or a layer, on an NVIDIA GPU of compute capability 8.0 (Ampere) or
            newer. Its Linear weights are 2:4, in float16 or bfloat16, with shapes that are multiples of 32 x 64.

    Returns:
        Names of the layers that this call converted.

    Raises:
        ValueError: a layer is not as described, or there is none. The message names each layer and what to do.
        RuntimeError: a weight is still parametrized (call `desparsify` first), or torch does not have the kernels.
        TypeError: the model is no nn.Module.

    Example:
        >>> model = nn.Linear(64, 32, dtype=torch.float16)  # its weight is dense
        >>> to_semi_structured(model)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: expected Linear layers for 2:4 kernels, got: the model: 512 of 512 groups of 4 hold more than 2...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be an nn.Module, got {type(model).__name__}")
    layers = {
        name: layer
        for name, layer in _linear_layers(model).items()
        if not isinstance(layer._parameters.get("weight"), SparseSemiStructuredTensor)
    }
    if not layers:
        raise ValueError(f"expected a model with dense Linear layers, got {type(model).__name__} without")
    for name, layer in layers.items():
        if layer._parameters.get("weight") is None:
            raise RuntimeError(
                f"expected plain layers, got a weight that is recomputed at each use at {_display(name)}; "
                "call feather_param.desparsify(model), or remove the other parametrization first"
            )
    _refuse_fast_path(model, layers)
    problems = {name: problem for name, layer in layers.items() if (problem := _problem(layer.weight))}
    if problems:
        shown = "; ".join(f"{_display(name)}: {problem}" for name, problem in list(problems.items())[:5])
        more = f"; and {len(problems) - 5} more layers" if len(problems) > 5 else ""
        raise ValueError(
            f"expected Linear layers for 2:4 kernels, got: {shown}{more}; "
            "or convert only submodules that have none of these layers"
        )
    for name, layer in layers.items():
        _refuse_device(name, layer.weight.device)
    converted = {
        weight: nn.Parameter(to_sparse_semi_structured(weight.detach().contiguous()), requires_grad=False)
        for weight in dict.fromkeys(layer.weight for layer in layers.values())  # tied weights once
    }
    for layer in layers.values():
        layer.weight = converted[layer.weight]
    return list(layers)


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _overfull(tensor: Tensor) -> int | None:
    """Return the number of groups of 4 with more than 2 non-zeros, or None if the tensor has no groups of 4."""
    if not tensor.dim() or tensor.shape[-1] % 4:
        return None
    return int(((tensor.detach() != 0).reshape(-1, 4).sum(dim=1, dtype=torch.uint8) > 2).sum())


def _problem(weight: Tensor) -> str | None:
    """Return the reason why a weight cannot be converted and what to do, or None."""
    rows, columns = weight.shape
    if rows % _ROWS or columns % _COLUMNS:
        return f"its weight is {rows} x {columns}, not multiples of {_ROWS} x {_COLUMNS}: it has to stay dense"
    if overfull := _overfull(weight):
        return (
            f"{overfull} of {weight.numel() // 4} groups of 4 hold more than 2 non-zeros: "
            "prune it 2:4, because a conversion would drop the others"
        )
    if weight.dtype not in _DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}: cast it with .half() or .bfloat16()"
    return None


def _refuse_fast_path(model: nn.Module, layers: dict[str, nn.Linear]) -> None:
    """Refuse layers whose weight torch passes to a fused kernel, which does not support 2:4 tensors."""
    if not torch.backends.mha.get_fastpath_enabled():
        return
    names: dict[nn.Module, str] = {layer: name for name, layer in layers.items()}
    for parent in model.modules():
        if isinstance(parent, _FAST_PATH):
            for child in parent.children():
                if (name := names.get(child)) is not None:
                    raise ValueError(
                        f"expected layers whose weight is used in F.linear, got {_display(name)}: in evaluation, "
                        f"{type(parent).__name__} passes it to a fused kernel without support for 2:4 weights; "
                        "call torch.backends.mha.set_fastpath_enabled(False) first"
                    )


def _refuse_device(name: str, device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(
            f"expected weights on a GPU, got {_display(name)} on {device}; only GPUs multiply 2:4 faster: "
            "call model.cuda() first"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise ValueError(
            f"expected a GPU of compute capability 8.0 (Ampere) or newer, got {'.'.join(map(str, capability))} "
            f"for {_display(name)}; older ones have no 2:4 kernels"
        )


def _display(name: str) -> str:
    return printable(name or "the model")

"""The multiply-adds of a forward pass, layer by layer, with and without the zeros."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from feather_param.core.baking import final_masks
from feather_param.ops.values import require_values
from feather_param.selection.names import names_of, plain_name
from feather_param.selection.weights import LAYERS, TRANSPOSED, is_matrix, parametrizations_of
from feather_param.utils.modes import evaluating
from feather_param.utils.text import aligned, grouped


@dataclass(frozen=True)
class LayerMultiplyAdds:
    """The multiply-adds of one weight.

    Attributes:
        name: its name.
        shape: its shape.
        uses: number of multiplications of each element in a forward pass.
        nonzeros: number of elements that are not zero.
    """

    name: str
    shape: tuple[int, ...]
    uses: int
    nonzeros: int

    @property
    def dense(self) -> int:
        """Number of multiply-adds with the zeros."""
        return self.uses * math.prod(self.shape)

    @property
    def remaining(self) -> int:
        """Number of multiply-adds without the zeros."""
        return self.uses * self.nonzeros


@dataclass(frozen=True)
class MultiplyAdds:
    """The multiply-adds of one forward pass.

    Attributes:
        rows: the counted weights in the model's order.
        uncounted: names of the other matrices and kernels, with the reason.
    """

    rows: tuple[LayerMultiplyAdds, ...]
    uncounted: dict[str, str] = field(default_factory=dict)

    @property
    def dense(self) -> int:
        """Number of multiply-adds with the zeros."""
        return sum(row.dense for row in self.rows)

    @property
    def remaining(self) -> int:
        """Number of multiply-adds without the zeros."""
        return sum(row.remaining for row in self.rows)

    def __str__(self) -> str:
        cells = [("weight", "shape", "multiply-adds", "remaining", "of dense", "of all remaining")]
        whole = max(1, self.remaining)
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            of_dense = f"{row.remaining / max(1, row.dense):.3%}"
            of_all = f"{row.remaining / whole:.2%}"
            cells.append((row.name, shape, f"{row.dense:,}", f"{row.remaining:,}", of_dense, of_all))
        of_dense = f"{self.remaining / max(1, self.dense):.3%}"
        cells.append(("all", "", f"{self.dense:,}", f"{self.remaining:,}", of_dense, "100.00%"))
        lines = aligned(cells)
        lines += [f"not counted: {line}" for line in grouped(self.uncounted)]
        return "\n".join(lines)


def multiply_adds(model: nn.Module, example_input: Any) -> MultiplyAdds:
    """Count the multiply-adds of one forward pass, with and without the zeros.

    The weights of Linear, Conv and ConvTranspose layers are counted. Biases, norms and activations are not. Each
    element of a weight counts once for each position that the layer applies it to, padding included. For a batch of
    size B, the number of positions is

    * Linear: B times the rows of its input,
    * Conv: B times the positions of its output,
    * ConvTranspose: B times the positions of its input.

    The remaining multiply-adds are a lower bound: no kernel skips every zero at no cost.

    The forward pass runs in evaluation mode without gradients. The model stays as it was.

    Args:
        model: a plain or a sparsified model. The zeros of a sparsified model are those that `desparsify` would write.
        example_input: the input of the model: a tensor, a tuple of positional arguments, or a mapping of keyword
            arguments. Use a batch of one to count for one example.

    Raises:
        TypeError: ``model`` is no nn.Module.
        ValueError: a sparsified weight holds NaN or infinity.
        RuntimeError: a Parameter has no values (meta device).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
        >>> with torch.no_grad():
        ...     _ = model[2].weight[:, 64:].zero_()
        >>> print(multiply_adds(model, torch.zeros(1, 3, 4, 4)))
        weight    shape    multiply-adds  remaining  of dense  of all remaining
        0.weight  8x3x3x3          3,456      3,456  100.000%            84.38%
        2.weight  10x128           1,280        640   50.000%            15.62%
        all                        4,736      4,096   86.486%           100.00%
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be an nn.Module, got {type(model).__name__}")
    require_values((plain_name(name), parameter) for name, parameter in model.named_parameters())
    uses: dict[nn.Module, int] = {}

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        source = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        uses[module] = uses.get(module, 0) + _applications(module, source, output)

    layers = [module for module in model.modules() if isinstance(module, LAYERS)]
    hooks = [layer.register_forward_hook(count, with_kwargs=True) for layer in layers]
    try:
        with evaluating(model), torch.no_grad():
            if isinstance(example_input, Mapping):
                model(**example_input)
            else:
                model(*(example_input if isinstance(example_input, tuple) else (example_input,)))
            return _counted(model, uses)
    finally:
        for hook in hooks:
            hook.remove()


def _counted(model: nn.Module, uses: Mapping[nn.Module, int]) -> MultiplyAdds:
    nonzeros = {key: int(mask.sum()) for key, mask in final_masks(model).items()}
    rows: list[LayerMultiplyAdds] = []
    uncounted: dict[str, str] = {}
    for module, (name, *_) in names_of(model).items():
        if "parametrizations" in name.split("."):
            continue
        prefix = f"{name}." if name else ""
        if module in uses:
            weight: Tensor = module.weight  # type: ignore[assignment]
            nonzero = nonzeros.get((module, "weight"))
            nonzero = int((weight != 0).sum()) if nonzero is None else nonzero
            rows.append(LayerMultiplyAdds(f"{prefix}weight", tuple(weight.shape), uses[module], nonzero))
            continue
        kind = parametrize.type_before_parametrizations(module).__name__
        reason = "its layer is not called in this pass" if isinstance(module, LAYERS) else f"a weight of {kind}"
        matrices = [tensor for tensor, value in module._parameters.items() if is_matrix(value)]
        uncounted.update({prefix + tensor: reason for tensor in [*matrices, *parametrizations_of(module)]})
    return MultiplyAdds(tuple(rows), uncounted)


def _applications(module: nn.Module, source: Tensor, output: Tensor) -> int:
    """Return the number of positions that a layer applied its weight to."""
    if isinstance(module, nn.Linear):
        return output.numel() // max(1, module.out_features)
    if isinstance(module, TRANSPOSED):
        return source.numel() // max(1, module.in_channels)
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return output.numel() // max(1, module.out_channels)

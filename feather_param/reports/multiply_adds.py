"""The multiplications that are left: what zeros could save at best, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from feather_param.core.baking import final_masks
from feather_param.selection.names import names_of
from feather_param.selection.weights import is_matrix, parametrizations_of
from feather_param.utils.text import aligned, grouped

__all__ = ["LayerMultiplyAdds", "MultiplyAdds", "multiply_adds"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_COUNTED = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)


@dataclass(frozen=True)
class LayerMultiplyAdds:
    """One weight: how often each of its elements is multiplied in a forward pass, and how many are not zero."""

    name: str
    shape: tuple[int, ...]
    uses: int
    nonzeros: int

    @property
    def dense(self) -> int:
        """Multiply-adds of the dense weight."""
        return self.uses * math.prod(self.shape)

    @property
    def left(self) -> int:
        """Those that its zeros do not make superfluous."""
        return self.uses * self.nonzeros


@dataclass(frozen=True)
class MultiplyAdds:
    """The multiply-adds of one forward pass."""

    rows: tuple[LayerMultiplyAdds, ...]  # the weights that were counted, in the model's order
    uncounted: dict[str, str] = field(default_factory=dict)  # other matrices and kernels, with the reason

    @property
    def dense(self) -> int:
        """Multiply-adds of the dense network."""
        return sum(row.dense for row in self.rows)

    @property
    def left(self) -> int:
        """Those that zeros do not make superfluous."""
        return sum(row.left for row in self.rows)

    def __str__(self) -> str:
        cells = [("weight", "shape", "multiply-adds", "left", "left/dense", "of all left")]
        whole = max(1, self.left)
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            share = f"{row.left / max(1, row.dense):.3%}"
            cells.append((row.name, shape, f"{row.dense:,}", f"{row.left:,}", share, f"{row.left / whole:.2%}"))
        share = f"{self.left / max(1, self.dense):.3%}"
        cells.append(("all", "", f"{self.dense:,}", f"{self.left:,}", share, "100.00%"))
        lines = aligned(cells)
        lines += [f"not counted: {line}" for line in grouped(self.uncounted)]
        return "\n".join(lines)


def multiply_adds(model: nn.Module, example_input: Any) -> MultiplyAdds:
    """Count the multiply-adds of one forward pass, and those that are left without the zeros.

    Counted are the weights of Linear, Conv and ConvTranspose layers, each element times the places it is applied at,
    padding included: with B examples, a Linear layer's at ``B * (rows of its input)``, a convolution's at
    ``B * (positions of its output)``, a transposed one's at ``B * (positions of its input)``. Biases, norms and
    activations are not. It is a bound: no kernel skips every zero for nothing.

    The pass is made in evaluation mode without gradients, and the model is left as it was.

    Args:
        model: a plain model (zeros are those of its weights) or a sparsified one (those that `desparsify` would leave).
        example_input: what the model takes: a tensor, a tuple of positional arguments, or a mapping of named ones.
            Give a batch of one to count for one example.

    Raises:
        TypeError: ``model`` is no nn.Module.
        ValueError: a sparsified weight holds NaN or infinity.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
        >>> with torch.no_grad():
        ...     _ = model[2].weight[:, 64:].zero_()
        >>> print(multiply_adds(model, torch.zeros(1, 3, 4, 4)))
        weight    shape    multiply-adds   left  left/dense  of all left
        0.weight  8x3x3x3          3,456  3,456    100.000%       84.38%
        2.weight  10x128           1,280    640     50.000%       15.62%
        all                        4,736  4,096     86.486%      100.00%
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be an nn.Module, got {type(model).__name__}")
    uses: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        uses[module] = uses.get(module, 0) + _applications(module, given, output)

    layers = [module for module in model.modules() if isinstance(module, _COUNTED)]
    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        with _evaluating(model), torch.no_grad():
            if isinstance(example_input, Mapping):
                model(**example_input)
            else:
                model(*(example_input if isinstance(example_input, tuple) else (example_input,)))
            return _counted(model, uses)
    finally:
        for hook in hooks:
            hook.remove()


def _counted(model: nn.Module, uses: Mapping[nn.Module, int]) -> MultiplyAdds:
    nonzeros = {place: int(mask.sum()) for place, mask in final_masks(model).items()}
    rows: list[LayerMultiplyAdds] = []
    uncounted: dict[str, str] = {}
    for module, (name, *_) in names_of(model).items():
        if "parametrizations" in name.split("."):
            continue
        prefix = f"{name}." if name else ""
        if module in uses:
            weight: Tensor = module.weight  # type: ignore[assignment]
            count = nonzeros.get((module, "weight"))
            count = int((weight != 0).sum()) if count is None else count
            rows.append(LayerMultiplyAdds(f"{prefix}weight", tuple(weight.shape), uses[module], count))
            continue
        kind = parametrize.type_before_parametrizations(module).__name__
        reason = "its layer is not called in this pass" if isinstance(module, _COUNTED) else f"a weight of {kind}"
        matrices = [tensor for tensor, value in module._parameters.items() if is_matrix(value)]
        uncounted.update({prefix + tensor: reason for tensor in [*matrices, *parametrizations_of(module)]})
    return MultiplyAdds(tuple(rows), uncounted)


def _applications(module: nn.Module, given: Tensor, output: Tensor) -> int:
    """Return how often each element of the layer's weight was multiplied."""
    if isinstance(module, nn.Linear):
        return output.numel() // max(1, module.out_features)
    if isinstance(module, _TRANSPOSED):
        return given.numel() // max(1, module.in_channels)
    assert isinstance(module, _CONVOLUTIONS)
    return output.numel() // max(1, module.out_channels)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode

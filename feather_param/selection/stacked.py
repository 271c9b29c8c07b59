"""Weights that carry parametrizations of other libraries (weight norm, spectral norm, ...)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from feather_param.ops.operator import feather_threshold
from feather_param.selection.weights import Weight
from feather_param.utils.text import printable


def through(parametrizations: Sequence[nn.Module], tensors: Sequence[Tensor]) -> Tensor:
    """Return the weight that parametrizations compute from its Parameters."""
    for parametrization in parametrizations:
        tensors = [parametrization(*tensors)]
    (value,) = tensors
    return value


def invert(
    name: str, originals: Sequence[Tensor], parametrizations: Sequence[nn.Module], value: Tensor
) -> list[Tensor]:
    """Return the Parameters from which parametrizations compute a given weight.

    Args:
        name: name of the weight, for the message.
        originals: the Parameters as they are now.
        parametrizations: those of other libraries, in their order. Some change their state when they are inverted.
        value: the weight to reach, with its zeros.

    Raises:
        ValueError: they cannot compute this weight, up to rounding, with exactly these zeros, or one of them has no
            inverse.
    """
    if not all(hasattr(parametrization, "right_inverse") for parametrization in parametrizations):
        raise _cannot_compute(name, parametrizations)
    with torch.no_grad():
        tensors: Any = value
        for parametrization in reversed(parametrizations):
            tensors = parametrization.right_inverse(tensors)  # type: ignore[operator]
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        # The norm of a row of zeros is 0, and the normalised row is 0 / 0. Such a row keeps its old direction.
        undefined = through(parametrizations, tensors).isnan()
        tensors = [
            torch.where(undefined, old, new) if new.shape == undefined.shape else new
            for old, new in zip(originals, tensors, strict=True)
        ]
        made = through(parametrizations, tensors)
        rounding = 100 * torch.finfo(value.dtype).eps
        if not (torch.equal(made == 0, value == 0) and torch.allclose(made, value, rtol=rounding, atol=0.0)):
            raise _cannot_compute(name, parametrizations)
    return tensors


def require_invertible(weights: Sequence[Weight]) -> None:
    """Raise the ValueError of `invert` for weights whose other parametrizations could not hold zeros.

    Each such weight is tried with half of its elements pruned. The model is not changed.
    """
    for weight in weights:
        place = weight.places[0]
        if place.parametrizations is not None and not place.originals[0].is_meta:
            dense = place.value().detach()
            value = feather_threshold(dense, dense.abs().float().median())
            invert(place.name, place.originals, copy.deepcopy(list(place.parametrizations)), value)


def _cannot_compute(name: str, parametrizations: Sequence[nn.Module]) -> ValueError:
    names = ", ".join(type(parametrization).__name__ for parametrization in parametrizations)
    return ValueError(
        f"expected the other parametrizations of {printable(name)} to be able to compute the pruned weight, got "
        f"{names}; remove them before sparsify (parametrize.remove_parametrizations), or leave the weight dense with "
        f"exclude={printable(repr(name))}"
    )

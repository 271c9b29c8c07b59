"""Scores that rank the elements of different weights together."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from feather_param.ops.distributed import held_here
from feather_param.ops.dtypes import INTEGER, flat


def deviations(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the standard deviation about zero of each weight, ``sqrt(mean of w^2)``, with four significant digits.

    The sums are computed in float64. Their order, and so their last digits, depend on the device and on the processes
    that hold the weight; the rounded result does not. It is NaN or infinite if an element is. The call waits for the
    device. If the weights are sharded, all processes must call it.

    Example:
        >>> deviations({"a": torch.tensor([3.0, -4.0]), "b": torch.zeros(0)})
        {'a': 3.536, 'b': 0.0}
    """
    parts, add_up = held_here(weights)
    norms = [torch.linalg.vector_norm(part.detach(), dtype=torch.float64) for part in parts.values()]
    squares = torch.stack([norm.to(norms[0].device) for norm in norms]).square()
    sums = (add_up(squares) if add_up else squares).tolist()
    return {
        name: float(f"{math.sqrt(total / max(1, weight.numel())):.4g}")
        for (name, weight), total in zip(weights.items(), sums, strict=True)
    }


def lamp_scores(weight: Tensor) -> Tensor:
    """Return the LAMP scores of a weight in ascending order, as float64 of one dimension.

    The score of an element is its square over the sum of its square and those of all elements after it in the order of
    magnitudes. Elements that are zero have the score 0. If an element is not finite, the last score is NaN.

    Example:
        >>> lamp_scores(torch.tensor([2.0, 0.0, -1.0]))
        tensor([0.0000, 0.2000, 1.0000], dtype=torch.float64)
    """
    squares = sorted_magnitudes(weight).double().square_().cpu()  # cumulative sums on a GPU vary from call to call
    array = squares.numpy()  # numpy reads backwards without a copy
    with np.errstate(invalid="ignore"):  # infinity over infinity is NaN
        np.divide(array, np.cumsum(array[::-1])[::-1], out=array, where=array != 0)
    return squares.to(weight.device)


def sorted_magnitudes(weight: Tensor) -> Tensor:
    """Return the magnitudes of a weight in ascending order, in its dtype. NaN comes last."""
    magnitudes = flat(weight.detach()).abs()
    if magnitudes.device.type != "cpu":
        return magnitudes.sort().values
    # numpy sorts integers several times as fast as torch sorts floating-point numbers
    bits = magnitudes.view(INTEGER[magnitudes.dtype])
    bits.numpy().sort()
    return magnitudes

"""The selection of the weights of a plain model, with all checks."""

from __future__ import annotations

from torch import nn

from feather_param.core.attach import require_plain
from feather_param.ops.finite import require_finite
from feather_param.ops.memory import require_own_memory
from feather_param.selection.globs import Filter
from feather_param.selection.select import Selection, select
from feather_param.selection.stacked import require_invertible


def checked_selection(model: nn.Module, include: Filter | None, exclude: Filter | None, min_params: int) -> Selection:
    """Return the weights of a model that can be pruned as asked. The model is not changed.

    Raises:
        ValueError: the model is sparsified already, a filter does not fit it, or a weight cannot be pruned.
        TypeError: an argument is of the wrong type.
    """
    if isinstance(model, nn.Module):
        require_plain(model)  # first: to read a weight of a sparsified model would refresh its thresholds
    selection = select(model, include, exclude, min_params)
    originals = [
        (place.name, each) for weight in selection.weights for place in weight.places for each in place.originals
    ]
    require_own_memory(originals, model.named_parameters())
    require_invertible(selection.weights)
    require_finite(selection.dense(), new=True)
    return selection

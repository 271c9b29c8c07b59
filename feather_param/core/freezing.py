"""Frozen masks: training goes on, the zeros stay where they are."""

from __future__ import annotations

import torch

from feather_param.core.baking import final_values, refuse_shards, write
from feather_param.ops.distributed import held_here
from feather_param.ops.kth import kth_magnitude
from feather_param.parametrizations import SharedSparsity, with_zeros

# Note [Frozen weights]
# A frozen model computes with masks, and its dense weights have zeros where these are False. An optimizer step may
# move the zeros (momentum, weight decay): the masks keep that from the forward pass, and `hold` sets them to zero
# again, after each step and before each save. So the state_dict has the entries that it had before, and is enough to
# find the masks again.


def freeze(shared: SharedSparsity) -> None:
    """Write the exact zeros into the Parameters and hold them there by masks; on an error nothing changes."""
    refuse_shards(shared)
    with torch.inference_mode(False):  # else the masks could not be part of a later backward pass
        values = final_values(shared)
        fixed = {name: value != 0 for name, value in values.items()}
        if not shared.position.zeros:  # what is zero before the pruning begins is not pruned
            fixed = {name: torch.ones_like(mask) for name, mask in fixed.items()}
        write(shared, values)
        shared.set_masks(fixed)
        shared.position.frozen_step = shared.position.step


def hold(shared: SharedSparsity) -> torch.Tensor:
    """Make the pruned elements of frozen weights zero again; return zero, or NaN where a weight is not finite.

    Raises:
        ValueError: a weight on a CPU holds NaN or infinity.
    """
    parts, add_up = held_here(shared.weights())
    zero = kth_magnitude(parts, 0, add_up)
    kept = shared.masks()
    for feather in shared.places:
        feather.hold()
    stacked = {place.name for place in shared.places.values() if len(place.parametrizations) > 1}
    if stacked:
        write(
            shared, {name: with_zeros(dense, kept[name]) for name, dense in shared.weights().items() if name in stacked}
        )
    return zero

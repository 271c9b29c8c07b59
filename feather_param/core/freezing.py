"""Frozen masks: training continues, and the zeros stay where they are.

A frozen model computes with masks, and its dense weights are zero where the masks are False. An optimizer step may
change these zeros by momentum or weight decay. The masks hide this from the forward pass, and `restore_zeros` undoes it
after each step and before each save. So the state_dict needs no entry for the masks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from feather_param.core.baking import final_values, require_writable, write
from feather_param.core.shared import SharedSparsity
from feather_param.ops.distributed import held_here
from feather_param.ops.kth import kth_magnitude
from feather_param.ops.masking import all_kept, with_exact_zeros


def freeze(shared: SharedSparsity) -> None:
    """Write the exact zeros into the Parameters and fix the masks. On an error nothing changes."""
    require_writable([shared])
    with torch.inference_mode(False):  # inference tensors could not be part of a later backward pass
        values = final_values(shared)
        fixed = {name: value != 0 for name, value in values.items()} if shared.position.zeros else all_kept(values)
        write(shared, values)
        shared.set_masks(fixed)
        shared.position.frozen_step = shared.position.step


def restore_zeros(shared: SharedSparsity) -> Tensor:
    """Restore the zeros of frozen weights.

    Returns:
        A 0-dim tensor for `LateNaN`: 0, or NaN if a weight on a GPU is not finite.

    Raises:
        ValueError: a weight on a CPU holds NaN or infinity.
    """
    parts, add_up = held_here(shared.weights())
    zero = kth_magnitude(parts, 0, add_up)
    masks = shared.masks()
    for each in shared.registrations.values():
        each.reader.restore_zeros()
    stacked = {each.name for each in shared.registrations.values() if each.stacked}
    if stacked:
        dense = {name: weight for name, weight in shared.weights().items() if name in stacked}
        write(shared, {name: with_exact_zeros(weight, masks[name]) for name, weight in dense.items()})
    return zero

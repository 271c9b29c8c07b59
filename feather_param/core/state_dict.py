"""The entries of a sparsified model's state_dict.

A dense weight is saved under the name that `torch.nn.utils.parametrize` gives it. One more entry holds the position in
the schedule (see `core.position`). Thresholds and masks are not saved: they follow from the position and the weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

POSITION = ".shared._extra_state"  # end of the name of the position's entry
_ORIGINAL = ".original"  # end of the name of a dense weight


def of_sparsified(names: Iterable[str]) -> bool:
    """Return whether a state_dict with these names is that of a sparsified model, whose weights are still dense."""
    return any("parametrizations." in name and name.endswith(POSITION) for name in names)


def dense_beside_pruned(names: Collection[str]) -> set[str]:
    """Return the names of the dense weights whose pruned weights are in the same state_dict, under the plain names.

    A checkpoint of transformers holds both: see `accept_plain`.

    Example:
        >>> position = "0.parametrizations.weight.0.shared._extra_state"
        >>> dense_beside_pruned(["0.weight", "0.parametrizations.weight.original", position])
        {'0.parametrizations.weight.original'}
    """
    if not of_sparsified(names):
        return set()
    found = set()
    for name in names:
        prefix, parametrized, tensor = name.removesuffix(_ORIGINAL).rpartition("parametrizations.")
        if parametrized and name.endswith(_ORIGINAL) and prefix + tensor in names:
            found.add(name)
    return found


def accept_plain(state_dict: dict[str, Any], prefix: str, tensors: Iterable[str]) -> None:
    """Rename a plain layer's entries to those of the sparsified layer, so that a plain state_dict loads.

    A state that holds both is that of a sparsified model, with its pruned weights added for plain models (a checkpoint
    of transformers). The pruned weights are dropped.

    Args:
        state_dict: the state that is being loaded; entries are renamed or dropped in place.
        prefix: prefix of the layer's entries.
        tensors: names of the layer's pruned tensors.
    """
    for tensor in tensors:
        original = f"{prefix}parametrizations.{tensor}.original"
        if prefix + tensor in state_dict:
            value = state_dict.pop(prefix + tensor)
            state_dict.setdefault(original, value)

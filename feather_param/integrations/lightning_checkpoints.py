"""Checkpoints of Lightning: plain and sparse in the file, sparsified in memory.

Lightning loads ``state_dict`` into the module before it calls a callback, and other callbacks (WeightAveraging) replace
it in the checkpoint. So a callback that changes it would be too late, or depend on the order of the callbacks. Here the
change is made where a checkpoint is written and read: Lightning and its callbacks see the state of the sparsified
module, and the file holds the plain one.

The file has one more entry, ``"feather_param"``: for each pruned module, by name, what a resume needs.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from feather_param import Controller, baked_state_dict

KEY = "feather_param"
"""The entry of a checkpoint."""
# WeightAveraging saves its average as the first and the module as the second.
_STATES = ("state_dict", "current_model_state")


class Pruned:
    """A pruned module of a LightningModule.

    Args:
        name: its name, empty for the LightningModule itself.
        module: the module.
        controller: its controller.
    """

    def __init__(self, name: str, module: nn.Module, controller: Controller) -> None:
        self.name, self.module, self.controller = name, module, controller

    def baked(self, state: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """Return the plain, sparse form of a state, and what `restored` needs to undo this.

        Args:
            state: the state_dict of the LightningModule, or of an average of it.
        """
        prefix = self.name and f"{self.name}."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        module = self._with_values(own)
        baked, live = baked_state_dict(module), module.state_dict()
        kept = {key for key, value in baked.items() if key in live and _same(value, live[key])}
        dense = {prefix + key: value for key, value in own.items() if key in live and key not in kept}
        sparse = {prefix + key: value for key, value in baked.items() if key not in kept} if dense else {}
        new = OrderedDict((key, value) for key, value in state.items() if key not in dense)
        new.update(sparse)
        metadata = {k: v for k, v in getattr(state, "_metadata", {}).items() if "parametrizations" not in k.split(".")}
        new._metadata = metadata  # type: ignore[attr-defined]
        return new, {"dense": dense, "sparse": list(sparse)}

    def _with_values(self, state: Mapping[str, Any]) -> nn.Module:
        """Return the module, or a copy with the values of a state if these are not the module's own.

        `baked_state_dict` of the state alone would need no copy. But it refuses patterns of users and parametrizations
        of other libraries, and warns at each checkpoint before the full rate.
        """
        live = self.module.state_dict()
        tensors = [(state[key], value) for key, value in live.items() if isinstance(value, Tensor) and key in state]
        if all(ours.data_ptr() == value.data_ptr() for ours, value in tensors if value.is_floating_point()):
            return self.module
        twin = copy.deepcopy(self.module)
        twin.load_state_dict(state, strict=False)
        return twin


def _same(value: Any, other: Any) -> bool:
    """Return whether two entries are one tensor. Entries that are no tensors are not baked."""
    return not isinstance(value, Tensor) or value.data_ptr() == other.data_ptr()


def restored(state: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of the sparsified module, from the two values that `Pruned.baked` returned."""
    sparse = set(change["sparse"])
    return {**{key: value for key, value in state.items() if key not in sparse}, **change["dense"]}


class SparseCheckpoints:
    """Reads and writes checkpoints with another ``CheckpointIO``, for a callback.

    Args:
        inner: the CheckpointIO of the strategy.
        name: the name of the pruned module.
    """

    def __init__(self, inner: Any, name: str) -> None:
        self.inner, self.name = inner, name
        self.pruned: Pruned | None = None
        self.finished: dict[str, Any] | None = None
        """The state of the controller of a module that is plain again."""
        self.rates: dict[str, float] = {}
        """The rate of each checkpoint, by its path."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint whose ``state_dict`` is plain and sparse."""
        if "state_dict" not in checkpoint:  # a launcher (ddp_spawn) saves the state of the module alone
            plain = self.pruned.baked(checkpoint)[0] if self.pruned else checkpoint
            return self.inner.save_checkpoint(plain, path, *args, **kwargs)
        if self.pruned is not None:
            self.rates[str(path)] = self.pruned.controller.rate
            baked = {name: self.pruned.baked(checkpoint[name]) for name in _STATES if name in checkpoint}
            plain = {name: state for name, (state, _) in baked.items()}
            changes = {name: change for name, (_, change) in baked.items()}
            if "optimizer_states" not in checkpoint:  # save_weights_only: it cannot be resumed
                changes = {}
            checkpoint = self._with_entry({**checkpoint, **plain}, changes, self.pruned.controller.state_dict())
        elif self.finished is not None:
            checkpoint = self._with_entry(checkpoint, {}, self.finished)
        return self.inner.save_checkpoint(checkpoint, path, *args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint. Its ``state_dict`` is sparsified if the module is, so that both fit."""
        checkpoint = self.inner.load_checkpoint(*args, **kwargs)
        entry = checkpoint.get(KEY, {}).get(self.name)
        if entry is None or self.pruned is None:
            return checkpoint
        return {**checkpoint, **{name: restored(checkpoint[name], change) for name, change in entry["changes"].items()}}

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint."""
        self.rates.pop(str(path), None)
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """Let the other CheckpointIO end."""
        self.inner.teardown()

    def _with_entry(
        self, checkpoint: Mapping[str, Any], changes: Mapping[str, Any], controller: Mapping[str, Any]
    ) -> dict[str, Any]:
        entry = {"changes": dict(changes), "controller": dict(controller), "rates": dict(self.rates)}
        return {**checkpoint, KEY: {**checkpoint.get(KEY, {}), self.name: entry}}

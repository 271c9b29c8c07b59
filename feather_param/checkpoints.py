"""Dense checkpoints load into a sparsified model as well as its own do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from feather_param.parametrizations import FeatherParametrization

__all__ = ["accept_dense", "forget_dense", "of_sparsified"]


def of_sparsified(names: Iterable[str]) -> bool:
    """Return whether these are the entries of a sparsified model's state_dict, whose weights are still dense."""
    return any("parametrizations." in name and name.endswith(".shared.pruned") for name in names)


def accept_dense(module: nn.Module) -> None:
    """Let ``load_state_dict`` of a sparsified layer take the plain layer's keys, too."""
    if not any(_is_ours(hook) for hook in module._load_state_dict_pre_hooks.values()):
        module.register_load_state_dict_pre_hook(_translate)
        module.register_load_state_dict_post_hook(_note)


def forget_dense(module: nn.Module) -> None:
    """Undo `accept_dense`."""
    for hooks in (module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks):
        for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]


def _is_ours(hook: Any) -> bool:
    return getattr(hook, "hook", hook) in (_translate, _note)  # torch wraps the first, to hand over the module


def _translate(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename ``weight`` to the parametrization's original, and fill in our own buffers where they are missing."""
    for tensor, place in module.parametrizations.items():  # type: ignore[union-attr, operator]
        assert isinstance(place, parametrize.ParametrizationList)
        at = f"{prefix}parametrizations.{tensor}."
        for position, feather in enumerate(place):
            if not isinstance(feather, FeatherParametrization):
                continue
            plain = len(place) == 1 and prefix + tensor in state_dict and at + "original" not in state_dict
            if plain:
                state_dict[at + "original"] = state_dict.pop(prefix + tensor)
            saved = any(key.startswith(f"{at}{position}.") for key in state_dict)
            others = len(place) > 1 and any(key.startswith(at) for key in state_dict)  # another library's layer
            if plain or (others and not saved):
                state_dict.update(_buffers(feather, f"{at}{position}."))
                feather.shared.stale = True
            elif saved:
                feather.shared.stale = False


def _note(module: nn.Module, incompatible_keys: Any) -> None:
    """Tell the group of weights that were loaded."""
    for place in module.parametrizations.values():  # type: ignore[union-attr, operator]
        for feather in place:
            if isinstance(feather, FeatherParametrization) and feather.member is feather:
                feather.shared.arrived(feather.name)


def _buffers(feather: FeatherParametrization, prefix: str) -> dict[str, Tensor]:
    """Return our own entries of the state_dict; real ones also where the model is on the meta device."""
    pruned = feather.shared.asked
    return {
        key: torch.full((), pruned if key.endswith("pruned") else 0, dtype=value.dtype) if value.is_meta else value
        for key, value in feather.state_dict(prefix=prefix).items()
    }

"""Baking of a saved state_dict, without the model that it was saved from."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from feather_param.core.baking import set_plain_metadata, with_plain_entries
from feather_param.core.budget import Budget
from feather_param.core.exact_values import exact_value, masks_of_frozen
from feather_param.core.position import Position
from feather_param.core.saved_position import SavedSettings, unpack_position, unpack_settings
from feather_param.core.state_dict import POSITION
from feather_param.core.warnings import warn_of_early
from feather_param.ops.dtypes import INTEGER
from feather_param.ops.finite import require_finite
from feather_param.ops.groups import Group, require_total
from feather_param.ops.kth import kth_magnitude
from feather_param.ops.masking import with_exact_zeros
from feather_param.ops.values import why_without_values
from feather_param.patterns import Pattern
from feather_param.selection.names import without_wrappers
from feather_param.utils.text import listed, printable
from feather_param.utils.warn import warn

# The key of a Parameter, and that of a position, with the prefix of the layer and the name of the tensor.
_ORIGINAL = re.compile(r"(?s)((?:.*\.)?)parametrizations\.([^.]+)\.original(\d*)")  # (?s): a name may have newlines
_POSITION = re.compile(rf"(?s)((?:.*\.)?)parametrizations\.([^.]+)\.\d+{re.escape(POSITION)}")
_MOST_COMPARED = 10**7  # names
_INSTEAD = "load the state into the model, sparsified as before, and save baked_state_dict(model)"


@dataclass(frozen=True)
class _Part:
    """The weights of a state that were sparsified together."""

    position: Position
    saved: SavedSettings
    pattern: Pattern
    keys: dict[str, list[str]]  # the keys of each weight, by its name; a tied weight has several
    weights: dict[str, Tensor]

    def groups(self, weights: Mapping[str, Tensor], zeros: int) -> list[Group]:
        """Return the groups of weights for a number of zeros, as in the training."""
        settings, pattern = self.saved.settings, self.pattern
        if allocation := settings.known_allocation:
            sizes = {name: weight.numel() for name, weight in weights.items()}
            budget = Budget(sizes, settings.max_rate, settings.min_nonzero, pattern.size, pattern.largest_rate)
            return pattern.allocate(allocation, weights, zeros, budget.guards)
        if self.saved.groups is None:
            raise ValueError(
                "expected a state with the zeros of each weight, which an allocation needs that is none of "
                f"feather_param.allocations, got one without, saved before they were computed; {_INSTEAD}"
            )
        units, count, _ = pattern.in_units(weights, zeros, {})
        groups = [
            Group(names, number, kth_magnitude({name: units[name] for name in names}, number))
            for names, number in self.saved.groups.items()
        ]
        require_total(groups, count, "of this state")
        return groups

    def values(self) -> dict[str, Tensor]:
        """Return the weights with exact zeros, by name."""
        zeros, pattern, weights = self.position.zeros, self.pattern, self.weights
        require_finite(weights)
        if self.position.frozen_step is not None:
            masks = masks_of_frozen(weights, zeros, pattern, self.groups)
            return {name: with_exact_zeros(weight, masks[name]) for name, weight in weights.items()}
        groups = self.groups(weights, zeros)
        masks = pattern.masks(weights, groups)
        thresholds = {name: group.threshold for group in groups for name in group.names}
        p = self.saved.settings.p
        return {name: exact_value(each, masks[name], thresholds[name], pattern, p) for name, each in weights.items()}


@torch.no_grad()
def baked_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the plain state_dict with exact zeros that a saved state of a sparsified model describes.

    It equals `feather_param.baked_state_dict` of the model that was saved. Tied weights stay tied.

    Args:
        state: a state_dict of a sparsified model, or of several models under different prefixes.

    Raises:
        ValueError: the state is plain already, is damaged, was saved by an older release, or is incomplete; its pattern
            is none of `feather_param.patterns`, or a weight carries parametrizations of other libraries.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> _ = feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0)
        >>> state = baked_state(model.state_dict())
        >>> list(state), int((state["weight"] == 0).sum())
        (['weight', 'bias'], 8)
    """
    layers: dict[str, dict[str, Tensor | None]] = {}  # by prefix
    parts = _parts(state)
    entries = [_split(_POSITION, key) for key in state if _POSITION.fullmatch(key)]
    ours = {f"{prefix}parametrizations.{tensor}." for prefix, tensor in entries}
    for part in parts:
        values = part.values()
        for name, keys in part.keys.items():
            for prefix, tensor in (_split(_ORIGINAL, key) for key in keys):
                layers.setdefault(prefix, {})[tensor] = values[name]
                ours.add(f"{prefix}parametrizations.{tensor}.")
    new = with_plain_entries(state, layers, ours)
    if metadata := getattr(state, "_metadata", None):
        set_plain_metadata(new, metadata, ours)
    if others := [key for key in new if (match := _ORIGINAL.fullmatch(key)) and not match[3]]:
        warn(
            f"parametrized weights that no entry *{POSITION} names are left as they are: {listed(others)}; they are of "
            "other libraries, or of a copy of a part of the model: then bake the model itself"
        )
    for part in parts:
        if part.position.frozen_step is None and part.position.zeros < part.saved.final_zeros:
            warn_of_early("the bake of a state", part.position.zeros, part.saved.final_zeros)
    return new


def _parts(state: Mapping[str, Tensor]) -> list[_Part]:
    """Return the parts of a state that were sparsified by themselves."""
    parts: dict[tuple[str, ...], _Part] = {}  # by the keys of their weights: a module that is used twice saves two
    keys = {"".join(_split(_ORIGINAL, key)): key for key in state if _ORIGINAL.fullmatch(key)}
    originals = [{form(name): key for name, key in keys.items()} for form in _FORMS]
    for key in state:
        if _POSITION.fullmatch(key):
            part = _part(state, key, originals)
            parts[tuple(sorted(each for keys in part.keys.values() for each in keys))] = part
    if not parts:
        found = next(filter(_ORIGINAL.fullmatch, state), None)
        if found is None:
            raise ValueError(
                "expected the state of a sparsified model, got a plain one: there is nothing to bake, use it as it is"
            )
        raise ValueError(
            f"expected an entry *{POSITION} beside {printable(found)}, got none: save the whole state_dict of the "
            "model; parametrizations of other libraries are removed with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    return list(parts.values())


def _part(state: Mapping[str, Tensor], entry: str, originals: Sequence[Mapping[str, str]]) -> _Part:
    """Return the part that a position belongs to.

    Args:
        state: the state.
        entry: the key of the position.
        originals: the keys of all dense weights by their plain names, in each of the forms.
    """
    saved = unpack_settings(state[entry], entry)
    if saved is None:
        raise ValueError(
            f"expected a state with the settings of its training, got one of an older feather_param without; {_INSTEAD}"
        )
    settings = saved.settings
    if settings.stacked:
        raise ValueError(
            "expected weights with no parametrization but ours, got another library's too at "
            f"{printable(settings.stacked[0])}; " + _INSTEAD
        )
    pattern = settings.known_pattern
    if pattern is None:
        raise ValueError(
            f"expected a pattern of feather_param.patterns, got {printable(settings.pattern)}, which only its program "
            f"knows; {_INSTEAD}"
        )
    if settings.allocation is not None and settings.known_allocation is None:
        raise ValueError(
            f"expected an allocation of this feather_param, got {printable(settings.allocation)}; bake with the "
            "release that saved the state"
        )
    keys = _keys(originals, entry, saved)
    weights = {name: _weight(state, own) for name, own in keys.items()}
    pattern.require_fit(weights)
    position = unpack_position(state[entry], sum(weight.numel() for weight in weights.values()), entry)
    return _Part(position, saved, pattern, keys, weights)


def _keys(originals: Sequence[Mapping[str, str]], entry: str, saved: SavedSettings) -> dict[str, list[str]]:
    """Return the keys of each weight. The state may have another prefix than the model that was sparsified."""
    names = {name: (name, *others) for name, others in saved.settings.weights.items()}
    nearest: list[bool] = []
    furthest = (0, 0)
    compared = 0  # a forged state has many names for one weight, and the time would be quadratic in them
    for form, known in zip(_FORMS, originals, strict=True):
        owner = form("".join(_split(_POSITION, entry)))
        formed = [tuple(map(form, every)) for every in names.values()]
        for old, new in dict.fromkeys(_different_prefixes(name, owner) for every in formed for name in every):
            found = (_renamed(every, old, new, known) for every in formed)
            before = list(itertools.takewhile(bool, found))  # most prefixes are wrong, and the first weight tells it
            if len(before) == len(names):
                return dict(zip(names, before, strict=True))
            compared += sum(map(len, formed[: len(before) + 1]))
            if not nearest or (len(before), -len(old + new)) > furthest:
                nearest = [bool(_renamed(every, old, new, known)) for every in formed]
                furthest = len(before), -len(old + new)
                compared += sum(map(len, formed))
            if compared > _MOST_COMPARED:
                break
    missing = [name for name, found in zip(names, nearest, strict=True) if not found]
    raise ValueError(
        f"expected the {len(names)} weights that {printable(entry)} names, got a state without {printable(missing[0])} "
        f"({len(missing)} missing); bake the state of the whole model under the names that torch gives it, and a copy "
        "of a part of the model together with the model itself, which needs baked_state_dict(model)"
    )


def _renamed(names: Iterable[str], old: str, new: str, originals: Mapping[str, str]) -> list[str]:
    """Return the keys of a weight with some names in a state that has another prefix."""
    ours = (new + name.removeprefix(old) for name in names if name.startswith(old))
    return [originals[name] for name in ours if name in originals]


def _different_prefixes(name: str, other: str) -> tuple[str, str]:
    """Return the different beginnings of two names with the same end, as prefixes.

    Example:
        >>> _different_prefixes("net.0.weight", "module.0.weight")
        ('net.', 'module.')
    """
    parts, others = name.split("."), other.split(".")
    while parts and others and parts[-1] == others[-1]:
        del parts[-1], others[-1]
    return "".join(f"{part}." for part in parts), "".join(f"{part}." for part in others)


def _weight(state: Mapping[str, Tensor], keys: list[str]) -> Tensor:
    """Return the tensor that some keys hold."""
    weight, *others = (state[key] for key in keys)
    if why := why_without_values(weight):
        raise ValueError(f"expected weights with values, got {printable(keys[0])} {why}; load them first")
    if weight.dtype not in INTEGER:
        raise ValueError(f"expected float64, float32, bfloat16 or float16, got {weight.dtype} at {printable(keys[0])}")
    for key, other in zip(keys[1:], others, strict=True):
        if other.dtype != weight.dtype or not torch.equal(other, weight):
            raise ValueError(
                f"expected {printable(keys[0])} and {printable(key)} to be equal, as the weights are tied, got two "
                "values: was one of them replaced with load_state_dict(assign=True)?"
            )
    return weight.detach()


def _split(pattern: re.Pattern[str], key: str) -> tuple[str, str]:
    """Return the prefix of the layer and the name of the tensor in a key."""
    match = pattern.fullmatch(key)
    assert match is not None
    return match[1], match[2]


def _unchanged(name: str) -> str:
    return name


_FORMS = (_unchanged, without_wrappers)  # wrappers may add parts inside of the names

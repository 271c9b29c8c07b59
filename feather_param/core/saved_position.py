"""The position of a model as a tensor in its state_dict, with all that a bake needs besides the weights.

Note [Saved position]

The tensor holds integers, since every tool saves these, and none averages or casts them:

    version, zeros, step, frozen step or -1, zeros of ``final_rate``,
    length of a text, the bytes of this text (`BakeSettings`),
    and unless the text names the allocation, for each weight: the number of its group, its place in that group, and
    the zeros of the group.

The number of integers does not change during the training, as torch.distributed.checkpoint requires. If two states of
one training are averaged, the text stays as it is. Version 1 has the first four integers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from feather_param.core.bake_settings import BakeSettings
from feather_param.core.position import Position
from feather_param.ops.groups import Group
from feather_param.ops.values import why_without_values
from feather_param.utils.text import printable

_VERSION = 2
_OLDER = 1  # the version without settings
_UNKNOWN = -1


@dataclass(frozen=True)
class SavedSettings:
    """What a saved position holds besides the position.

    Attributes:
        final_zeros: the number of zeros at the end of the schedule.
        settings: the settings.
        groups: for each group of weights, its names and its zeros in units of the pattern; None if not known.
    """

    final_zeros: int
    settings: BakeSettings
    groups: dict[tuple[str, ...], int] | None


def pack(position: Position, final_zeros: int, settings: BakeSettings, groups: Sequence[Group] | None) -> Tensor:
    """Return a position and the settings as int64 [n], see Note [Saved position]. Thresholds are not saved.

    Args:
        position: the position.
        final_zeros: the number of zeros at the end of the schedule.
        settings: the settings.
        groups: the groups at this position; None if they are not known.
    """
    frozen = -1 if position.frozen_step is None else position.frozen_step
    text = settings.text().encode()
    numbers = [_VERSION, position.zeros, position.step, frozen, final_zeros, len(text)]
    rows: list[int] = []
    if settings.allocation is None:
        given = {
            name: (i, place, group.zeros)
            for i, group in enumerate(groups or ())
            for place, name in enumerate(group.names)
        }
        rows = [number for name in settings.weights for number in given.get(name, (_UNKNOWN,) * 3)]
    # `frombuffer` and `cat` take microseconds. Some loops call state_dict() at each step.
    characters = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int64)
    head, tail = (torch.tensor(each, dtype=torch.int64, device="cpu") for each in (numbers, rows))
    return torch.cat([head, characters, tail])


def unpack_position(state: Any, total: int, entry: str) -> Position:
    """Return the position that a tensor holds, without thresholds.

    Args:
        state: what `pack` returned.
        total: number of elements of all prunable weights of the model.
        entry: name of the tensor in the state_dict, for the message.

    Raises:
        ValueError: it is another kind of tensor, or of another model or version.
    """
    version, zeros, step, frozen = _numbers(state, entry)[:4].tolist()
    if version not in (_OLDER, _VERSION):
        raise ValueError(
            f"expected the state of a sparsified model in version {_VERSION} or before, got {version}; "
            "load it with the feather_param release that wrote it"
        )
    if not 0 <= zeros <= total or step < 0:
        raise ValueError(
            f"expected the state of this model, which has {total:,} prunable weights, got one with {zeros:,} zeros "
            f"at step {step}; give sparsify the model and the settings of the run that saved it"
        )
    return Position(zeros, step, None if frozen < 0 else frozen)


def unpack_settings(state: Any, entry: str) -> SavedSettings | None:
    """Return what a tensor holds besides the position, or None if an older release saved it.

    Args:
        state: what `pack` returned.
        entry: name of the tensor in the state_dict, for the message.

    Raises:
        ValueError: it is another kind of tensor, or damaged.
    """
    numbers = _numbers(state, entry).tolist()
    if numbers[0] == _OLDER:
        return None
    try:
        final_zeros, length, *rest = numbers[4:]
        if not 0 < length <= len(rest):
            raise ValueError(f"a text of {length} bytes in {len(rest)}")
        settings = BakeSettings.parsed(bytes(rest[:length]).decode())
        return SavedSettings(final_zeros, settings, _groups(settings, rest[length:]))
    except ValueError as error:
        raise ValueError(
            f"expected {printable(entry)} as feather_param saves it, got a damaged one ({printable(error)}); save "
            "the state_dict as it is"
        ) from error


def _groups(settings: BakeSettings, rows: list[int]) -> dict[tuple[str, ...], int] | None:
    """Return the zeros of each group, by its names."""
    if settings.allocation is not None:
        return None
    if len(rows) != 3 * len(settings.weights):
        raise ValueError(f"{len(rows)} numbers for {len(settings.weights)} weights")
    if _UNKNOWN in rows:
        return None
    names: dict[int, list[str]] = {}
    zeros = dict(zip(rows[::3], rows[2::3], strict=True))
    in_order = sorted(zip(rows[::3], rows[1::3], settings.weights, strict=True))  # ties are broken in this order
    for group, _, name in in_order:
        names.setdefault(group, []).append(name)
    return {tuple(own): zeros[group] for group, own in names.items()}


def _numbers(state: Any, entry: str) -> Tensor:
    if isinstance(state, Tensor) and (why := why_without_values(state)):
        raise ValueError(
            f"expected the position of a sparsified model with values, got {printable(entry)} {why}; load it first"
        )
    integers = isinstance(state, Tensor) and not (state.is_floating_point() or state.is_complex())
    if not integers or state.dim() != 1 or state.numel() < 4 or (state[0] == _OLDER and state.numel() > 4):
        found = f"{state.dtype} of shape {tuple(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(
            f"expected the position of a sparsified model ({printable(entry)}) to be a row of integers, got {found}; "
            "save the state_dict as it is, without casting the integers in it"
        )
    return state

"""Deepcopies of a sparsified model.

Note [Copies]

A deepcopy is a snapshot (the best model, a teacher) or a moving average; torch does not say which. No controller steps
it, unless the controller was copied as well. The rules are in `SharedSparsity.follow_source` and the `__deepcopy__` of
`SharedSparsity` and `FeatherParametrization`.

* A copy has thresholds and a position of its own, and refers to the position of the model that it was copied from: its
  *source*.
* While the weights of a copy do not change, it keeps its number of zeros.
* When they have changed, it takes the number of zeros and the step of its source at that moment, and computes the
  thresholds from its own weights. So a moving average follows the schedule.
* Loading a state_dict is not treated as a change: the copy takes the position that was loaded, or keeps its own.
* Writes that torch does not count are found by a checksum of the weights.
* A copy of a part of the model does not have all the weights, so it takes the threshold of its source.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from feather_param.core.position import Position
from feather_param.core.registration import Registration
from feather_param.core.versions import checksum_of

_FOLLOWERS = "feather_param followers"  # key in the memo of a deepcopy: the sources that refer to a position


@dataclass(eq=False)
class Source:
    """The position that a copy follows: that of the model it was made from."""

    position: Position
    controlled: bool = False  # the controller was copied along with the model, and may step the copy
    trained: bool = False  # a gradient has reached a weight of the copy

    def position_for(self, own: Position) -> Position:
        """Return the new position of a copy whose weights have changed, given its old one."""
        source = self.position
        # If the source was frozen, the copy still prunes by magnitude: its zeros are those of the frozen step.
        step = source.step if source.frozen_step is None else source.frozen_step
        return replace(own, zeros=source.zeros, step=step)


def have_changed(registrations: Iterable[Registration]) -> bool:
    """Return whether the weights of a copy differ from those that its thresholds were computed from."""
    return any(
        checksum_of(each.originals).differs(each.checksum) for each in registrations if each.checksum is not None
    )


def source_of_copy(own: Position, source: Source | None, copied: Position, memo: dict[Any, Any]) -> Source:
    """Return the source of a new copy.

    If one call of deepcopy copies a model together with a copy of it, the new copy follows the new model, in either
    order.

    Args:
        own: position of the model that is copied.
        source: its source, if it is a copy itself.
        copied: position of the new copy.
        memo: the memo of the deepcopy.
    """
    followed = own if source is None or source.controlled else memo.get(id(source.position), source.position)
    new = Source(followed)
    memo[id(own)] = copied
    for follower in memo.get((_FOLLOWERS, id(own)), ()):
        follower.position = copied
    memo.setdefault((_FOLLOWERS, id(followed)), []).append(new)
    return new

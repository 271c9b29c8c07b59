"""Deepcopies of a sparsified model.

Note [Copies]

A deepcopy is a snapshot (the best model, a teacher) or a moving average; torch does not say which. No controller steps
it, unless the controller was copied as well.

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

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from feather_param.core.budget import Budget
from feather_param.core.config import Config
from feather_param.core.position import Position
from feather_param.core.registration import Registration
from feather_param.core.versions import checksum_of
from feather_param.ops.groups import Group
from feather_param.utils.warn import warn

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


class Copyable(nn.Module):
    """The state of a sparsified model, which a deepcopy copies and which then follows its source."""

    def __init__(self, config: Config, budget: Budget) -> None:
        super().__init__()
        self.config, self.budget = config, budget
        self.position = Position()
        self.registrations: dict[nn.Module, Registration] = {}  # by parametrization, in the model's order
        self.aliases: dict[str, tuple[str, ...]] = {}  # the other names of each weight in the model, by its name
        self.source: Source | None = None  # of a copy
        # Where theta changes during training: the current gradient scale of pruned elements.
        self.theta = torch.ones((), dtype=torch.float32, device="cpu") if callable(config.theta) else None

    @property
    def frozen(self) -> bool:
        """Whether the masks are fixed."""
        return self.position.frozen_step is not None

    @property
    def complete(self) -> bool:
        """Whether all weights are here. A deepcopy of a part of the model has only some."""
        return len({each.name for each in self.registrations.values()}) == len(self.budget.sizes)

    def follow_source(self) -> None:
        """Give a copy whose weights have changed the position of its source. Other models do not change."""
        own, source = self.position, self.source
        if source is None or self.frozen:
            return
        if not self.complete:
            # A part of the model cannot break ties: all elements that equal the threshold are pruned.
            here = {each.name for each in self.registrations.values()}
            groups = source.position.groups if have_changed(self.registrations.values()) else own.groups
            own.groups = [
                Group(tuple(name for name in each.names if name in here), self.budget.total, each.threshold.clone())
                for each in groups
            ]
            return
        now = self.position_now()
        if now is own:
            return
        if source.trained and now.zeros != own.zeros:
            warn(
                f"a copy of a sparsified model is trained, and no controller steps it: it had {own.zeros:,} zeros and "
                f"takes the {now.zeros:,} of the model that it was copied from, as a moving average does; to give it "
                "a schedule of its own, copy both: model, controller = copy.deepcopy((model, controller))"
            )
        own.zeros, own.step = now.zeros, now.step
        self.write_theta()

    def position_now(self) -> Position:
        """Return the own position, or for a copy whose weights have changed, that of its source."""
        own, source = self.position, self.source
        if source is None or self.frozen or not self.complete or not have_changed(self.registrations.values()):
            return own
        return source.position_for(own)

    def note_gradient(self) -> None:
        """Note that a gradient has reached a weight. A copy that has a controller stops following its source."""
        if self.source is not None:
            self.source.trained = True
            if self.source.controlled:
                self.source = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Copyable:
        """Return the shared state of a copy. The copied parametrizations add their registrations to it."""
        twin = type(self)(self.config, self.budget)
        memo[id(self)] = twin
        twin.position = replace(self.position_now())
        twin.aliases = self.aliases
        twin.source = source_of_copy(self.position, self.source, twin.position, memo)
        if self.theta is not None:
            with torch.inference_mode(False):
                twin.theta = torch.empty_like(self.theta)
            twin.write_theta()
        return twin.train(self.training)

    def write_theta(self) -> None:
        """Write theta for the current position where forward passes, and compiled graphs, read it."""
        if self.theta is not None:
            self.theta.fill_(self.config.theta_at(self.config.rate(self.position.step)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Copyable:
        if self.theta is not None and (device := fn(self.theta).device) != self.theta.device:
            self.theta = torch.empty((), dtype=torch.float32, device=device)
            self.write_theta()
        return self

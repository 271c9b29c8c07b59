"""Deepcopies of a sparsified model, and what tells that a weight was written to."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from feather_param.allocations import Group
from feather_param.ops.distributed import is_sharded
from feather_param.ops.dtypes import flat
from feather_param.utils.warn import warn

if TYPE_CHECKING:
    from feather_param.parametrizations import FeatherParametrization, Position, SharedSparsity

_FOLLOWERS = "feather_param followers"  # of a position, in the memo of a deepcopy

# Note [Copies]
# A deepcopy is either a snapshot (the best model so far, a teacher) or a moving average, and nobody tells which. No
# controller steps it. So it has thresholds and a position of its own, and holds on to the position of the model that it
# was copied from, its `source`. As long as its weights stay, it keeps its number of zeros. Once they have moved, it
# takes the zeros and the step of its source at that moment, and the thresholds from its own weights. What is loaded
# into it is no move: it keeps the position that came with it, or else its own.
# A write that bumps no version is found by the bits of the weights: their sum as integers, which is exact in any order
# and on any device.
# A copy of a part of the model cannot know the threshold of the whole, and takes that of its source.


class Seen(NamedTuple):
    """Which tensors were seen, and a number that grows with each write to them (Note [Thresholds])."""

    tensors: tuple[weakref.ref[Tensor], ...]  # no ids: a tensor may get that of one that is gone
    version: int

    def replaced(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these are other tensors."""
        for seen, tensor in zip(self.tensors, tensors, strict=False):  # in each forward pass
            if seen() is not tensor:
                return True
        return len(self.tensors) != len(tensors)


def seen(tensors: Sequence[Tensor]) -> Seen:
    """Return what there is to see of some tensors."""
    return Seen(tuple(map(weakref.ref, tensors)), version(tensors))


def version(tensors: Sequence[Tensor]) -> int:
    """Return a number that grows with each write to some tensors."""
    total = 0
    for tensor in tensors:
        total += 0 if tensor.is_inference() else tensor._version
    return total


class Bits(NamedTuple):
    """The sum of the bits of some tensors; None where they have no values."""

    dtype: torch.dtype
    total: Tensor | None

    def differ(self, other: Bits) -> bool:
        """Return whether these are certainly other numbers; another dtype has others for the same ones."""
        if self.total is None or other.total is None or self.dtype != other.dtype:
            return False
        return bool(self.total != other.total.to(self.total.device))


@torch.no_grad()
def bits(originals: Sequence[Tensor]) -> Bits:
    """Return the bits of the tensors that a weight is computed from."""
    totals: list[Tensor] = []
    for tensor in originals:
        part: Any = tensor.detach()
        part = part.to_local() if is_sharded(part) else part
        if part.is_meta or isinstance(part, FakeTensor):
            return Bits(part.dtype, None)
        raw = flat(part).contiguous().view(torch.uint8)
        raw = raw.clone() if raw.storage_offset() % 8 else raw
        even = raw.numel() // 8 * 8  # eight bytes at a time take a third of the time that four do
        totals += [raw[:even].view(torch.int64).sum(), raw[even:].sum()]
    return Bits(originals[0].dtype, torch.stack(totals).sum())


def moved(shared: SharedSparsity) -> bool:
    """Return whether the weights of a copy are no longer those that its thresholds were computed from."""
    return any(bits(p.originals).differ(f.bits) for f, p in shared.places.items() if f.bits is not None)


def position(shared: SharedSparsity) -> Position:
    """Return the position of a model as its weights are now; see Note [Copies]."""
    own, source = shared.position, shared.source
    if source is None or shared.frozen or not shared.whole or not moved(shared):
        return own
    # A copy of a model that was frozen later goes on by magnitude, from the step of which the zeros are.
    step = source.step if source.frozen_step is None else source.frozen_step
    return replace(own, zeros=source.zeros, step=step)


def follow(shared: SharedSparsity) -> None:
    """Let a copy whose weights have moved follow its source; nothing happens to any other model."""
    own, source = shared.position, shared.source
    if source is None or shared.frozen:
        return
    if not shared.whole:  # a threshold of the whole cuts what equals it: a part cannot know which of these stay
        here = {place.name for place in shared.places.values()}
        own.groups = [
            Group(tuple(name for name in group.names if name in here), shared.budget.total, group.threshold.clone())
            for group in (source if moved(shared) else own).groups
        ]
        return
    now = position(shared)
    if now is own:
        return
    if shared.trained and now.zeros != own.zeros:
        warn(
            f"a copy of a sparsified model is trained, and no controller steps it: it had {own.zeros:,} zeros and "
            f"takes the {now.zeros:,} of the model that it was copied from, as a moving average does; to give it a "
            "schedule of its own, copy both: model, controller = copy.deepcopy((model, controller))"
        )
    own.zeros, own.step = now.zeros, now.step
    shared.write_theta()


def note_training(shared: SharedSparsity) -> None:
    """Note that a gradient has come to a copy; one that has its own controller goes its own way then."""
    shared.trained = True
    if shared.controlled:
        shared.source = None


def copy_shared(shared: SharedSparsity, memo: dict[Any, Any]) -> SharedSparsity:
    """Return the state of a copy: the parametrizations of the copy enter it one by one."""
    twin = type(shared)(shared.config, shared.budget)
    memo[id(shared)] = twin
    twin.position = replace(position(shared))
    # Where a model is copied together with a copy of it, in whatever order, the new copy follows the new model.
    own, source = shared.position, shared.source
    twin.source = own if source is None or shared.controlled else memo.get(id(source), source)
    memo[id(own)] = twin.position
    for follower in memo.get((_FOLLOWERS, id(own)), ()):
        follower.source = twin.position
    memo.setdefault((_FOLLOWERS, id(twin.source)), []).append(twin)
    if shared.theta is not None:
        with torch.inference_mode(False):
            twin.theta = torch.empty_like(shared.theta)
        twin.write_theta()
    return twin.train(shared.training)


def copy_parametrization(feather: FeatherParametrization, memo: dict[int, Any]) -> FeatherParametrization:
    """Return a parametrization of a copy, and enter it in the copy's state."""
    twin = type(feather).__new__(type(feather))
    memo[id(feather)] = twin
    with torch.inference_mode(False):  # tensors made in inference mode could never change
        vars(twin).update(copy.deepcopy({name: value for name, value in vars(feather).items() if name != "bits"}, memo))
    twin.bits, twin.written = None, seen([twin.threshold])
    place = feather.shared.places.get(feather)
    if place is not None and {id(place.parametrizations), id(place.site.module)} <= memo.keys():
        site = replace(place.site, module=memo[id(place.site.module)])
        twin.shared.places[twin] = place._replace(site=site, parametrizations=memo[id(place.parametrizations)])
        twin.seen = None
        if all(id(tensor) in memo for tensor in place.watched):
            now = seen([memo[id(tensor)] for tensor in place.watched])
            twin.seen = now._replace(version=-1) if feather.changed(or_replaced=True) else now
        twin.bits = bits(place.originals)
    return twin

"""The parametrization that applies the Feather operator to one weight, and the state that all of them share."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from feather_param.allocations import Budget, Group, count_zeros, masks
from feather_param.core import copies
from feather_param.core.config import Config
from feather_param.core.state_dict import pack_position, unpack_position
from feather_param.ops.count import PruneCount
from feather_param.ops.distributed import held_here, is_sharded, local, whole
from feather_param.ops.dtypes import rounded_down, smallest_kept
from feather_param.ops.finite import require_finite
from feather_param.ops.operator import feather_threshold
from feather_param.ops.tracing import concrete, eager
from feather_param.selection.weights import Site, originals_of

__all__ = ["FeatherParametrization", "feather_threshold"]

# Note [Thresholds]
# The controller has the thresholds made at each of its steps, from the weights and the number of zeros: `move` calls
# `_take`, which calls the allocation. They stand in the `Position`, which reports and bakes read; `_write` copies them
# into a buffer of each parametrization, in the precision of its weight, which forward passes and compiled graphs read.
# A deepcopy has its own buffers and its own `Position` (Note [Copies]). Both Positions hold the same tensors until one
# of them gets new thresholds; no such tensor is ever written to.
# A threshold is valid for the weights that it was computed from. So a parametrization remembers which tensor its weight
# was, and the version of that tensor, which torch counts up at each write. A forward pass that finds another version
# has all the thresholds taken anew (`refresh_if_changed`), for the same zeros. A layer's pass compares its own weight.
# A layer that comes by a second time since all weights were compared begins a new pass of the model: all are compared
# again. What bumps no version makes the parametrizations forget what they have seen: `train()` and `eval()` (for writes
# to `.data`), `to()`, and loads.
# A pass inside of a backward pass refreshes nothing: where an optimizer steps in there, a layer that is computed once
# more for its gradients (activation checkpointing) must find the threshold of the first time.
# Nor does a pass refresh anything where versions tell nothing: if its tensor is another than the one that was there
# outside of the pass (FSDP2 gathers one for each pass, `torch.func` puts its own there), if a foreign buffer stands in
# place of ours, at tensors without values (tracers, the meta device) or made in inference mode, and in compiled graphs.
# `Controller.refresh` is for these.


@dataclass
class Position:
    """How far a model has come, and its thresholds; of the model that it was copied from, a copy keeps this alone."""

    zeros: int = 0  # of all the weights together
    step: int = 0  # optimizer steps seen
    frozen_step: int | None = None  # at which the masks were fixed
    groups: Sequence[Group] = ()  # how the zeros are divided among the weights, with the thresholds

    @property
    def thresholds(self) -> dict[str, Tensor]:
        """The threshold of each weight, by name."""
        return {name: group.threshold for group in self.groups for name in group.names}


class Place(NamedTuple):
    """Where a parametrization stands."""

    name: str  # that the weight had when it was sparsified; tied places have the same
    site: Site
    parametrizations: parametrize.ParametrizationList  # all those of the tensor, with its Parameters
    parameter_order: tuple[str, ...]  # of the layer before any parametrization

    @property
    def originals(self) -> list[Tensor]:
        """The Parameters that the tensor is computed from; most parametrizations take just one."""
        return originals_of(self.parametrizations)

    @property
    def before(self) -> list[nn.Module]:
        """Other libraries' parametrizations that were registered before ours, in order."""
        return [*itertools.takewhile(lambda p: not isinstance(p, FeatherParametrization), self.parametrizations)]

    @property
    def watched(self) -> list[Tensor]:
        """All that the weight depends on as it comes to our parametrization, with what those before it hold."""
        if len(self.parametrizations) == 1:
            return self.originals
        return [*self.originals, *(tensor for each in self.before for tensor in each.parameters())]


class SharedSparsity(nn.Module):
    """What the parametrizations of a model share: they read it, the controller writes it; see Note [Thresholds].

    It is a submodule of exactly one of them, the first that torch comes to, and a plain attribute of the others: so
    ``state_dict``, ``to`` and ``deepcopy`` come by once, and the plain references of a deepcopy lead to the copy's own.
    Its position is a small integer tensor in the model's ``state_dict`` (torch's *extra state*, which nobody averages
    or casts).
    """

    def __init__(self, config: Config, budget: Budget) -> None:
        super().__init__()
        self.config, self.budget = config, budget
        self.position = Position()
        self.places: dict[FeatherParametrization, Place] = {}  # in the order of the model's modules
        self.read: set[FeatherParametrization] = set()  # those that came by since all weights were compared
        self.unwatched = False  # versions tell nothing, for processes share the weights
        # A position that is being loaded, and the parametrizations whose weights have yet to come.
        self.arriving: tuple[tuple[int, int, int | None], set[FeatherParametrization]] | None = None
        self.source: Position | None = None  # of a copy, that of the model it was copied from (see `core.copies`)
        self.controlled = False  # of a copy: a copy of the controller came with it, which may step it one day
        self.trained = False  # of a copy: a gradient has come to its weights
        # The gradient scale of pruned elements, where it changes in time.
        self.theta = torch.ones((), dtype=torch.float32, device="cpu") if callable(config.theta) else None

    def enter(self, places: dict[FeatherParametrization, Place]) -> None:
        """Take in all parametrizations, in the order of the modules; the first one becomes the owner."""
        self.places = places
        owner = next(iter(places))
        owner.add_module("shared", owner.__dict__.pop("shared").train(owner.training))

    @property
    def frozen(self) -> bool:
        """Whether the masks are fixed."""
        return self.position.frozen_step is not None

    @property
    def aim(self) -> int:
        """The number of zeros that the schedule ends with."""
        return self.budget.zeros(self.config.final_rate)

    @property
    def whole(self) -> bool:
        """Whether all the weights are here; a deepcopy of a part of the model has some of them."""
        return len({place.name for place in self.places.values()}) == len(self.budget.sizes)

    @property
    def originals(self) -> list[Tensor]:
        """The Parameters behind all the weights."""
        return [original for place in self.places.values() for original in place.originals]

    @property
    def sharded(self) -> bool:
        """Whether processes share a weight."""
        return any(map(is_sharded, self.originals))

    def weights(self) -> dict[str, Tensor]:
        """Return the dense weights by name, as they come to our parametrizations: past those registered before.

        Raises:
            ValueError: places that were tied when they were sparsified no longer are.
        """
        first: dict[str, FeatherParametrization] = {}
        for feather, place in self.places.items():
            other = self.places[first.setdefault(place.name, feather)]
            if other is not place and any(a is not b for a, b in zip(other.originals, place.originals, strict=True)):
                sites = [(each.site.name.removesuffix(each.site.tensor), each.site.tensor) for each in (place, other)]
                again = " = ".join(f"model.{layer}parametrizations.{tensor}.original" for layer, tensor in sites)
                raise ValueError(
                    f"expected {other.site.name} and {place.site.name} to share one Parameter, as when they were "
                    "sparsified, got two: load_state_dict(assign=True) unties them; load without, or tie them again: "
                    f"{again}"
                )
        return {name: first[name].dense() for name in self.budget.sizes if name in first}

    # -- thresholds and masks ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def move(self, step: int, frozen_step: int | None = None) -> None:
        """Move to a step of the schedule, with the thresholds or masks for it; on an error nothing changes."""
        self.arriving = None
        rate = self.config.rate(step if frozen_step is None else frozen_step)
        self.config.theta_at(rate)  # raises
        zeros = self.budget.zeros(rate)
        if frozen_step is None:
            self._take(zeros)
            self.set_masks(None)
        elif not self.frozen or self._masks_are_lost:
            self.set_masks(self._masks_for(zeros))
            self.position.zeros = zeros
        self.position.step, self.position.frozen_step = step, frozen_step
        self.write_theta()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the thresholds anew, from the weights as they are now; of a frozen model, its masks if they are lost."""
        self._require_values()
        copies.follow(self)
        if not self.frozen:
            self._take(self.position.zeros)
        elif self._masks_are_lost:
            self.set_masks(self._masks_for(self.position.zeros))

    def settle(self) -> None:
        """Refresh before a report or a bake, which refuse NaN and infinity, also on a GPU and in frozen weights."""
        if self.frozen or any(original.device.type != "cpu" for original in self.originals):  # else `refresh` looks
            require_finite(*held_here(self.weights()))
        self.refresh()

    def refresh_if_changed(self, reader: FeatherParametrization | None = None) -> None:
        """Refresh if the thresholds no longer are those of the weights: of a reader that comes by, or of all."""
        if self.unwatched or (reader is not None and reader.lent):
            return
        if reader is None or reader in self.read or not self.read:
            self.read.clear()
            readers = [*self.places]
        else:
            readers = [reader]
        if reader is not None:
            self.read.add(reader)
        if any(feather.changed(or_replaced=reader is None) for feather in readers):
            self.refresh_if_possible()
        elif any(f.threshold._version != f.written.version and concrete(f.threshold) for f in readers):
            self._write()  # somebody has copied or averaged all buffers

    @eager
    def refresh_if_possible(self) -> None:
        """Take the thresholds anew if there are values to take them from, and this is no backward pass."""
        if torch._C._current_graph_task_id() != -1 or self.unwatched or not self.places:
            return
        if all(isinstance(o, nn.Parameter) and concrete(o) and not o.is_meta for o in self.originals):
            self.refresh()

    def masks(self) -> dict[str, Tensor]:
        """Return which elements of each weight stay, by name, by the thresholds as they are."""
        fixed = {place.name: feather.mask for feather, place in self.places.items() if feather.mask is not None}
        return fixed if self.frozen else masks(self.weights(), self.position.groups)

    def exact_masks(self) -> dict[str, Tensor]:
        """Return the masks that a bake would have; a refresh is made where these no longer have the right number."""
        if not (self.frozen or self.sharded or self.source):  # a copy that has moved takes other zeros
            self._require_values()
            self.refresh_if_changed()
            found = self.masks()
            if sum(int(mask.sum()) for mask in found.values()) == self.budget.total - self.position.zeros:
                return found
        self.settle()
        return self.masks()

    def counts(self) -> dict[str, PruneCount]:
        """Return how many elements of each weight `masks` leaves out, and how many it keeps that compute as zero."""
        if self.frozen:
            return {name: PruneCount(int((~mask).sum())) for name, mask in self.masks().items()}
        return count_zeros(self.weights(), self.position.groups)

    def set_masks(self, fixed: Mapping[str, Tensor] | None) -> None:
        """Let masks stand in for the thresholds, by name, or no longer."""
        for feather, place in self.places.items():
            feather.mask = None if fixed is None else fixed[place.name]

    @property
    def _masks_are_lost(self) -> bool:
        return any(feather.mask is None for feather in self.places)

    def _masks_for(self, zeros: int) -> dict[str, Tensor]:
        """Return masks of so many zeros: those of the smallest magnitudes, or of the zeros that are there already."""
        self._require_values()
        weights = self.weights()
        with torch.inference_mode(False):  # else they could not be part of a later backward pass
            if not zeros:  # what is zero before the pruning begins is not pruned
                return {name: torch.ones_like(whole(weight), dtype=torch.bool) for name, weight in weights.items()}
            return masks(weights, self.config.allocation(weights, zeros, self.budget.guards))

    def _require_values(self) -> None:
        for place in self.places.values():
            if any(original.is_meta for original in place.originals):
                raise ValueError(
                    f"expected weights with values, got {place.site.name} on the meta device; load them first"
                )

    def _take(self, zeros: int) -> None:
        """Compute the thresholds for a number of zeros; a copied part, which does not know the whole, keeps its own."""
        if self.whole:
            self.position.groups = self.config.allocation(self.weights(), zeros, self.budget.guards)
        self.position.zeros = zeros
        self._write()
        self.unwatched = self.sharded
        for feather, place in self.places.items():
            feather.seen = copies.seen(place.watched)
            feather.bits = None if self.source is None else copies.bits(place.originals)

    def _write(self) -> None:
        """Write the thresholds where forward passes, and compiled graphs, read them."""
        thresholds = self.position.thresholds
        values: list[Tensor] = []
        rounded: dict[tuple[int, torch.dtype], Tensor] = {}  # most weights have the same
        with torch.inference_mode(False), torch.no_grad():
            for feather, place in self.places.items():
                like, old = place.originals[0], feather.threshold
                key = id(threshold := thresholds[place.name]), like.dtype
                if key not in rounded:
                    rounded[key] = rounded_down(threshold, like.dtype)
                values.append(rounded[key])
                if old.dtype != values[-1].dtype or old.device != like.device or old.is_inference() or feather.lent:
                    feather.threshold = torch.empty_like(values[-1], device=like.device)
            torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                [feather.threshold for feather in self.places], values
            )
        for feather in self.places:
            feather.written = copies.seen([feather.threshold])

    def write_theta(self) -> None:
        """Write theta for the position where forward passes, and compiled graphs, read it."""
        if self.theta is not None:
            self.theta.fill_(self.config.theta_at(self.config.rate(self.position.step)))

    # -- the position in the model's state_dict ---------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """Return the position as an int64 tensor (see `core.state_dict`)."""
        position = copies.position(self)
        return pack_position(position.zeros, position.step, position.frozen_step)

    def set_extra_state(self, state: Any) -> None:
        """Note a saved position: the model goes there when all the weights have come, and stays where a part comes."""
        self.arriving = unpack_position(state, self.budget.total), set(self.places)

    def loaded(self, feather: FeatherParametrization) -> None:
        """Note that a weight was loaded. After the last one, thresholds or masks follow at once."""
        feather.forget()
        feather.bits = None
        if self.arriving is not None:
            (zeros, step, frozen_step), missing = self.arriving
            missing.discard(feather)
            if not missing:
                self.position.zeros, self.position.step, self.position.frozen_step = zeros, step, frozen_step
                self.arriving = None
                self.write_theta()
                self.set_masks(None)
        if feather is next(reversed(self.places), None):
            with contextlib.suppress(ValueError):  # NaN: whoever uses these weights hears of it, not who loads them
                self.refresh_if_possible()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:  # type: ignore[override]
        *_, missing, _, errors = args
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        except ValueError as error:  # torch raises it together with others, when all has been loaded
            errors.append(str(error))
        missing[:] = [name for name in missing if name != f"{prefix}_extra_state"]  # a plain model's state has none

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedSparsity:
        return copies.copy_shared(self, memo)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedSparsity:
        if self.theta is not None and (device := fn(self.theta).device) != self.theta.device:
            self.theta = torch.empty((), dtype=torch.float32, device=device)
            self.write_theta()
        return self


class FeatherParametrization(nn.Module):
    """Reparametrize a weight by the Feather operator, with a threshold that somebody else writes.

    Made by :func:`feather_param.sparsify`; for use with :mod:`torch.nn.utils.parametrize`.

    Attributes:
        threshold: the threshold of this weight: a 0-dim buffer, float64 where the weight is, else float32. It is not
            saved, for it follows from the weights and the number of zeros.
        mask: once frozen, which elements stay, whatever their magnitude (bool, of the weight's shape); else None.
            It is not saved: the dense weight has its zeros where the mask is False (see `core.freezing`).

    Shape:
        ``forward`` maps a weight of any shape to one of the same shape and dtype.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.weight = nn.Parameter(torch.tensor([[-2.0, 0.5]]))
        >>> controller = feather_param.sparsify(layer, final_rate=0.5, total_steps=1, end_step=0)
        >>> layer.parametrizations.weight[0].threshold, layer.weight
        (tensor(0.5000), tensor([[-1.9895,  0.0000]], grad_fn=<_FeatherThresholdBackward>))
    """

    shared: SharedSparsity
    threshold: Tensor
    mask: Tensor | None

    def __init__(self, shared: SharedSparsity) -> None:
        super().__init__()
        object.__setattr__(self, "shared", shared)
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32), persistent=False)
        self.mask = None
        self.seen: copies.Seen | None = None  # what the threshold was computed from; None: have the next pass look
        self.written = copies.seen([self.threshold])  # the same of the threshold itself
        self.bits: copies.Bits | None = None  # of a copy, what tells whether the weight has changed since
        self.register_load_state_dict_post_hook(lambda feather, _: feather.shared.loaded(feather))

    def forward(self, weight: Tensor) -> Tensor:
        shared = self.shared
        compiling = torch.compiler.is_compiling()
        if self.mask is None:
            if not compiling:
                shared.refresh_if_changed(self)
            elif shared.source is not None:  # nobody could call `Controller.refresh` for a copy: a break in the graph
                shared.refresh_if_possible()
        if self.mask is not None:
            return torch.where(self.mask, weight, 0.0)
        theta: Any = shared.config.theta if shared.theta is None else shared.theta
        value = feather_threshold(weight, self.threshold, theta, shared.config.p)
        if shared.source is not None and value.requires_grad and not compiling:
            value.register_hook(lambda gradient: copies.note_training(shared))
        return value

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Make ``layer.weight = w`` store ``w`` as the dense weight."""
        return weight

    def dense(self) -> Tensor:
        """Return the weight as it comes here: past the parametrizations registered before."""
        place = self.shared.places[self]
        return through(place.before, place.originals)

    def changed(self, or_replaced: bool = False) -> bool:
        """Return whether the weight was written since the threshold was computed, or another one took its place."""
        place = self.shared.places.get(self)
        if place is None or self.seen is None:
            return place is not None
        tensors = place.watched
        if self.seen.replaced(tensors):
            return or_replaced
        return self.seen.version != copies.version(tensors)

    def forget(self) -> None:
        """Have the next forward pass look, at the tensor that is in place now."""
        if (place := self.shared.places.get(self)) is not None:
            self.seen = copies.seen(place.watched)._replace(version=-1)

    @property
    def lent(self) -> bool:
        """Whether a buffer of somebody else stands in the place of ours (`torch.func.functional_call`)."""
        return self.written.replaced([self.threshold])

    def hold(self) -> None:
        """Set the pruned elements of a frozen dense weight to zero, and those that stay to anything else."""
        place = self.shared.places.get(self)
        if self.mask is None or place is None or len(place.parametrizations) > 1:
            return  # what other libraries' parametrizations make is held by `core.freezing.hold`
        with torch.no_grad():
            original: Any = place.originals[0]
            part = original.to_local() if is_sharded(original) else original
            part.copy_(with_zeros(part, local(self.mask, original)))

    def train(self, mode: bool = True) -> FeatherParametrization:
        if not mode or not self.training:  # some loops call `train()` before each batch
            self.forget()
        return super().train(mode)

    def _save_to_state_dict(self, *args: Any) -> None:  # type: ignore[override]
        self.hold()
        super()._save_to_state_dict(*args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatherParametrization:
        before, place = self.threshold, self.shared.places.get(self)
        if self.bits is not None and place is not None:  # of a copy: a cast is no move, and hides none
            if self.bits.differ(copies.bits(place.originals)):
                copies.follow(self.shared)
            self.bits = copies.bits([fn(original.detach()) for original in place.originals])
        super()._apply(fn, recurse)
        if self.threshold.dtype != before.dtype:
            self.threshold = before.to(self.threshold.device)
        elif before.is_meta:
            self.threshold.zero_()  # `to_empty`
        self.written = copies.seen([self.threshold])
        if self.mask is not None:
            empty = self.mask.is_meta or self.threshold.is_meta
            self.mask = None if empty else self.mask.to(self.threshold.device)
        self.forget()
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        replaces = overwrites or before.is_meta or self.threshold.is_meta
        if replaces and place is not None and not any(map(is_sharded, place.originals)):
            self.seen = None  # the Parameter is about to be replaced
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatherParametrization:
        return copies.copy_parametrization(self, memo)

    def extra_repr(self) -> str:
        frozen = ", frozen" if self.mask is not None else ""
        return f"p={self.shared.config.p}, theta={self.shared.config.theta}{frozen}"


def states_of(model: nn.Module) -> list[SharedSparsity]:
    """Return what the parametrizations of a model share, once for each part that was sparsified by itself."""
    found = [module.shared for module in model.modules() if isinstance(module, FeatherParametrization)]
    return list(dict.fromkeys(found))


def through(parametrizations: Sequence[nn.Module], tensors: Sequence[Tensor]) -> Tensor:
    """Return what parametrizations make of the Parameters of a tensor, one after the other."""
    for parametrization in parametrizations:
        tensors = [parametrization(*tensors)]
    (value,) = tensors
    return value


def with_zeros(dense: Tensor, mask: Tensor) -> Tensor:
    """Return a weight with zeros where the mask is False; other zeros become the smallest number."""
    return torch.where(mask, torch.where(dense == 0, smallest_kept(dense.dtype), dense), 0.0)

"""The parametrization that applies the Feather operator to one weight, and the state that all of them share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from feather_param.allocations import Budget, Group, masks
from feather_param.core import copies
from feather_param.core.config import Config
from feather_param.core.state_dict import pack_position, unpack_position
from feather_param.shards import is_sharded, local, whole
from feather_param.thresholding import concrete, feather_threshold, smallest_kept

__all__ = ["FeatherParametrization", "Place", "Position", "SharedSparsity", "feather_threshold", "held", "rounded_down"]

# Note [Thresholds]
# The controller makes the thresholds, from the weights and the number of zeros, at each of its steps; they stand in
# the `Position` of the `SharedSparsity`, and in a buffer of each parametrization, which its forward pass reads.
# A threshold is valid for the weights that it was computed from. So a parametrization remembers which tensor its weight
# was, and the version of that tensor, which torch counts up at each write. A forward pass that finds another version
# has all the thresholds taken anew (`SharedSparsity.look`), with the same number of zeros. What bumps no version
# (writes to `.data`, casts, loads) makes the parametrizations forget what they have seen: `train()` and `eval()`,
# `to()`, `load_state_dict()`.
# A forward pass looks at each weight as it comes to it, and at all of them when it comes to the first one of the model.
# It does not look inside a backward pass: where an optimizer steps in there, a layer that is computed once more for its
# gradients (activation checkpointing) must find the threshold of the first time, although other layers have moved.
# Where versions tell nothing, nobody looks: another tensor in the weight's place (FSDP2 gathers one for each pass,
# `torch.func.functional_call` is given one), tensors without values (tracers, transforms, the meta device), tensors
# made in inference mode, and compiled graphs. `Controller.refresh` is for these.


@dataclass
class Position:
    """How far a model has come: of the one that a controller steps, its copies hold on to this, and to nothing else.

    Attributes:
        zeros: number of zeros of all the weights together.
        step: optimizer steps seen.
        frozen_step: the step at which the masks were fixed; None while they are not.
        groups: how the zeros are divided among the weights, with the thresholds.
    """

    zeros: int = 0
    step: int = 0
    frozen_step: int | None = None
    groups: Sequence[Group] = ()


class Place(NamedTuple):
    """Where a parametrization stands.

    Attributes:
        name: the name that the weight had when it was sparsified; tied places have the same.
        site: the name that the tensor had here.
        parametrizations: all the parametrizations of the tensor, and what they are computed from.
        parameter_order: the layer's parameters before any parametrization, to restore their order.
    """

    name: str
    site: str
    parametrizations: parametrize.ParametrizationList
    parameter_order: tuple[str, ...] = ()

    @property
    def originals(self) -> list[Tensor]:
        """The Parameters that the tensor is computed from; most parametrizations take just one."""
        names = [f"original{i}" for i in range(self.parametrizations.ntensors)]
        return [
            getattr(self.parametrizations, name)
            for name in (["original"] if self.parametrizations.is_tensor else names)
        ]


class SharedSparsity(nn.Module):
    """What the parametrizations of a model share: they read it, the controller writes it; see Note [Thresholds].

    It is a submodule of exactly one of them, the first, and a plain attribute of the others: so ``state_dict``, ``to``
    and ``deepcopy`` come by once, and the plain references of a deepcopy lead to the copy's own. Its position is a small
    integer tensor in the model's ``state_dict`` (torch's *extra state*, which nobody averages, casts or broadcasts).

    Args:
        config: the settings.
        budget: how many zeros the weights may get.

    Attributes:
        position: how far this model has come.
        source: of a deepcopy, the position of the model that it was copied from (see `core.copies`).
        places: where each parametrization stands.
        theta: gradient scale of pruned elements where it changes in time: a 0-dim float32 tensor, else None.
        trained: of a deepcopy, whether a gradient has come to its weights.
    """

    def __init__(self, config: Config, budget: Budget) -> None:
        super().__init__()
        self.config, self.budget = config, budget
        self.position = Position()
        self.source: Position | None = None
        self.trained = False
        self.places: dict[FeatherParametrization, Place] = {}
        self.theta = torch.ones((), device="cpu") if callable(config.theta) else None

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
    def sharded(self) -> bool:
        """Whether processes share a weight."""
        return any(is_sharded(original) for place in self.places.values() for original in place.originals)

    def dense(self, feather: FeatherParametrization) -> Tensor:
        """Return the dense weight as it comes to a parametrization: past those registered before it."""
        place = self.places[feather]
        values: list[Any] = list(place.originals)
        for parametrization in place.parametrizations:
            if parametrization is feather:
                break
            values = [parametrization(*values)]
        (value,) = values
        return value

    def weights(self) -> dict[str, Tensor]:
        """Return the dense weights by name.

        Raises:
            ValueError: places that were tied when they were sparsified no longer are.
        """
        first: dict[str, FeatherParametrization] = {}
        for feather, place in self.places.items():
            other = self.places[first.setdefault(place.name, feather)]
            if other is not place and any(a is not b for a, b in zip(other.originals, place.originals, strict=True)):
                raise ValueError(
                    f"expected {other.site} and {place.site} to share one Parameter, as when they were sparsified, got "
                    "two: load_state_dict(assign=True) unties weights; tie them again, or load without assign"
                )
        return {name: self.dense(first[name]) for name in self.budget.sizes if name in first}

    # -- thresholds and masks ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def move(self, step: int, frozen_step: int | None = None) -> None:
        """Move to a step of the schedule, with the thresholds or masks for it; on an error nothing changes."""
        position = self.position
        rate = self.config.rate(step if frozen_step is None else frozen_step)
        theta, zeros = self.config.theta_at(rate), self.budget.zeros(rate)
        if frozen_step is None:
            self._take(zeros)
            self.fix(None)
        elif not self.frozen or self._masks_are_lost:
            fixed = self._masks_for(zeros)
            position.zeros = zeros
            self.fix(fixed)
        position.step, position.frozen_step = step, frozen_step
        if self.theta is not None:
            self.theta.fill_(theta)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the thresholds anew, from the weights as they are now; of a frozen model, its masks if they are lost."""
        copies.follow(self)
        if not self.frozen:
            self._take(self.position.zeros)
        elif self._masks_are_lost:
            self.fix(self._masks_for(self.position.zeros))

    @torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage] # it looks at values: not to be compiled
    def look(self, reader: FeatherParametrization, weight: Tensor) -> None:
        """Take the thresholds anew for a forward pass whose weight is not the one that was seen last."""
        if reader not in self.places or not concrete(weight) or self.sharded:
            return
        if torch._C._current_graph_task_id() != -1:  # inside a backward pass
            return
        if any(original.is_meta for place in self.places.values() for original in place.originals):
            return
        self.refresh()

    def note_training(self, gradient: Tensor) -> None:
        """Note that a copy got a gradient, which none of a moving average does."""
        self.trained = True

    def keep_up(self) -> None:
        """Take the thresholds anew if the weights are not those that they were computed from."""
        for feather, place in self.places.items():
            seen, now = feather.seen, copies.seen(place.originals)
            if feather.mask is None and (seen is None or (seen.identity == now.identity and seen != now)):
                self.look(feather, place.originals[0])
                return

    def masks(self) -> dict[str, Tensor]:
        """Return which elements of each weight stay, by name, after `refresh`."""
        fixed = {place.name: feather.mask for feather, place in self.places.items() if feather.mask is not None}
        return fixed if self.frozen else masks(self.weights(), self.position.groups)

    def fix(self, fixed: Mapping[str, Tensor] | None) -> None:
        """Let masks stand in for the thresholds, by name, or no longer."""
        for feather, place in self.places.items():
            feather.mask = None if fixed is None else fixed[place.name]

    @property
    def _masks_are_lost(self) -> bool:
        return any(feather.mask is None for feather in self.places)

    def _masks_for(self, zeros: int) -> dict[str, Tensor]:
        """Return masks of so many zeros: those of the smallest magnitudes, or of the zeros that are there already."""
        weights = self.weights()
        with torch.inference_mode(False):  # else they could not be part of a later backward pass
            if not zeros:  # what is zero before the pruning begins is not pruned
                return {name: torch.ones_like(whole(weight), dtype=torch.bool) for name, weight in weights.items()}
            return masks(weights, self.config.allocation(weights, zeros, self.budget.guards))

    def _take(self, zeros: int) -> None:
        """Compute the thresholds for a number of zeros; a copied part, which cannot know those of the whole, keeps its."""
        if self.whole:
            self.position.groups = self.config.allocation(self.weights(), zeros, self.budget.guards)
        self.position.zeros = zeros
        self.write()
        sharded = self.sharded
        for feather, place in self.places.items():
            feather.seen = copies.NEVER if sharded else copies.seen(place.originals)
            feather.bits = None if self.source is None else copies.bits(place.originals)

    def write(self) -> None:
        """Write the thresholds where forward passes, and compiled graphs, read them."""
        thresholds = {name: group.threshold for group in self.position.groups for name in group.names}
        targets: list[Tensor] = []
        values: list[Tensor] = []
        with torch.inference_mode(False), torch.no_grad():
            for feather, place in self.places.items():
                like, target = place.originals[0], feather.threshold
                value = rounded_down(thresholds[place.name], like.dtype)
                if target.dtype != value.dtype or target.device != like.device or target.is_inference():
                    feather.threshold = target = torch.empty_like(value, device=like.device)
                targets.append(target)
                values.append(value)
            torch._foreach_copy_(targets, values)
        for feather, target in zip(self.places, targets, strict=True):
            feather.written = target._version

    # -- the position in the model's state_dict ---------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """Return the position as an int64 tensor (see `core.state_dict`)."""
        return pack_position(copies.zeros(self), self.position.step, self.position.frozen_step)

    def set_extra_state(self, state: Any) -> None:
        """Go to a saved position; the thresholds, or the masks, follow when the weights are there."""
        position = self.position
        position.zeros, position.step, position.frozen_step = unpack_position(state, self.budget.total)
        self.fix(None)
        for feather in self.places:
            feather.forget(loaded=True)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        *_, missing, _, errors = args
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        except ValueError as error:  # torch raises it together with others, when all has been loaded
            errors.append(str(error))
        missing[:] = [name for name in missing if name != f"{prefix}_extra_state"]  # a plain model's state has none

    def loaded(self, feather: FeatherParametrization) -> None:
        """Note that a weight was loaded; when it was the last one, the thresholds follow at once."""
        feather.forget(loaded=True)
        if feather is next(reversed(self.places), None):
            with contextlib.suppress(ValueError):  # NaN: whoever uses these weights hears of it, not who loads them
                self.look(feather, self.places[feather].originals[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedSparsity:
        return copies.copy_shared(self, memo)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedSparsity:
        if self.theta is not None and (device := fn(self.theta).device) != self.theta.device:
            step = self.position.step if self.position.frozen_step is None else self.position.frozen_step
            theta = self.config.theta_at(self.config.rate(step))
            self.theta = torch.full((), theta, dtype=torch.float32, device=device)
        return self


class FeatherParametrization(nn.Module):
    """Reparametrize a weight by the Feather operator, with a threshold that somebody else writes.

    Made by :func:`feather_param.sparsify`; for use with :mod:`torch.nn.utils.parametrize`.

    Args:
        shared: what it shares with the other parametrizations of its model.
        owner: whether ``shared`` is registered here; true for exactly one of them.

    Attributes:
        threshold: the threshold of this weight: a 0-dim buffer, float64 where the weight is, else float32. It is not
            saved, for it follows from the weights and the number of zeros.
        mask: once frozen, which elements stay, whatever their magnitude (bool, of the weight's shape); else None.
            It is not saved: the dense weight has its zeros where the mask is False (see `core.freezing`).
        first: whether it stands before all other parametrizations of its tensor, and gets the Parameter itself.
        seen: which weight the threshold was computed from (see Note [Thresholds]); None if that is forgotten.
        written: the version of ``threshold`` when it was written; another one means that somebody else wrote to it.
        bits: of a copy, what tells whether the weight has changed since (see `core.copies`).

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

    def __init__(self, shared: SharedSparsity, owner: bool = True) -> None:
        super().__init__()
        if owner:
            self.shared = shared
        else:
            object.__setattr__(self, "shared", shared)
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32), persistent=False)
        self.mask = None
        self.first = True
        self.seen: copies.Seen | None = None
        self.written = 0
        self.bits: copies.Bits | None = None

    def forward(self, weight: Tensor) -> Tensor:
        shared = self.shared
        if self.mask is None:
            if not torch.compiler.is_compiling():
                self._keep_up(weight)
            elif shared.source is not None:  # nobody could call `Controller.refresh` for a copy: a break in the graph
                shared.look(self, weight)
        if self.mask is not None:
            return torch.where(self.mask, weight, 0.0)
        theta = shared.config.theta if shared.theta is None else shared.theta
        value = feather_threshold(weight, self.threshold, theta, shared.config.p)
        if shared.source is not None and value.requires_grad and not torch.compiler.is_compiling():
            value.register_hook(shared.note_training)
        return value

    def _keep_up(self, weight: Tensor) -> None:
        """See to it that the threshold is that of the weight; see Note [Thresholds]."""
        seen = self.seen
        if seen is None:
            self.shared.look(self, weight)
            return
        if self.first:
            identity, version = id(weight), 0 if weight.is_inference() else weight._version
        else:
            identity, version = copies.seen(self.shared.places[self].originals)
        if identity != seen.identity:
            return
        if version != seen.version:
            self.shared.look(self, weight)
        elif "shared" in self._modules:  # the first one
            self.shared.keep_up()
        if self.threshold._version != self.written:
            self.shared.write()

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Make ``layer.weight = w`` store ``w`` as the dense weight."""
        return weight

    def train(self, mode: bool = True) -> FeatherParametrization:
        if not mode or not self.training:  # some loops call `train()` before each batch
            self.forget()
        return super().train(mode)

    def forget(self, loaded: bool = False, replaced: bool = False) -> None:
        """Have the next forward pass take the thresholds anew.

        Args:
            loaded: the weight comes from a checkpoint: it is no move of a copy.
            replaced: another tensor may stand in the weight's place.
        """
        place = self.shared.places.get(self)
        if place is None:
            return
        if not (loaded or replaced) or any(map(is_sharded, place.originals)):
            self.seen = self.seen and self.seen._replace(version=-1)
        else:
            self.seen = None
        if loaded:
            self.bits = None

    def hold(self) -> None:
        """Set the pruned elements of a frozen dense weight to zero, and those that stay to anything else."""
        place = self.shared.places.get(self)
        if self.mask is None or place is None or len(place.parametrizations) > 1:
            return  # what other libraries' parametrizations make is held by `core.freezing.hold`
        with torch.no_grad():
            original: Any = place.originals[0]
            mask = local(self.mask, original)
            part = original.to_local() if is_sharded(original) else original
            part.copy_(held(part, mask))

    def _save_to_state_dict(self, *args: Any) -> None:
        self.hold()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.shared.loaded(self)  # the weight itself was loaded just before

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatherParametrization:
        before = self.threshold
        super()._apply(fn, recurse)
        if self.threshold.dtype != before.dtype:  # a cast, which changes the bits of the weight, but is no move
            self.threshold = before.to(self.threshold.device)
            self.bits = None
        elif before.is_meta:
            self.threshold.zero_()  # `to_empty`
        self.written = self.threshold._version
        if self.mask is not None:
            self.mask = self.mask.to(self.threshold.device)
        self.forget(replaced=True)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatherParametrization:
        return copies.copy_parametrization(self, memo)

    def extra_repr(self) -> str:
        frozen = ", frozen" if self.mask is not None else ""
        return f"p={self.shared.config.p}, theta={self.shared.config.theta}{frozen}"


def held(dense: Tensor, mask: Tensor) -> Tensor:
    """Return a weight with zeros where the mask is False, and only there."""
    return torch.where(mask, torch.where(dense == 0, smallest_kept(dense.dtype), dense), 0.0)


def rounded_down(threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a threshold in the precision for weights of a dtype; in float32, it cuts these at the same place."""
    if dtype == torch.float64:
        return threshold.double()
    narrow = threshold.float()
    if threshold.dtype == torch.float64:
        narrow = torch.where(narrow > threshold, narrow.nextafter(torch.zeros_like(narrow)), narrow)
    return narrow

"""The threshold that a group of weights shares, and how a copy of a model keeps its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from feather_param.allocation import Share, allocate
from feather_param.shards import is_sharded

if TYPE_CHECKING:
    from feather_param.parametrizations import FeatherParametrization

__all__ = ["NO_CEILING", "SharedThreshold"]

# The ceiling of a weight below its cap. Not infinity: an average of two infinities may be NaN.
NO_CEILING = torch.finfo(torch.float32).max

# Elements of each weight by which a copy tells whether it has moved.
_SAMPLE = 1024

# Note [One threshold, many readers]
# The `SharedThreshold` is a submodule of exactly one parametrization (the "owner", the first weight of the
# group) and a plain attribute of the others. One registration means one entry in the state_dict (two would be
# shared memory, which safetensors refuses), one visit by `.to()` and one copy by `deepcopy`; and the
# plain references in a deepcopy lead to the copy's own threshold, so that it stands alone.

# Note [Copies]
# A deepcopy of a sparsified model is either a snapshot (best model so far, a teacher) or a moving average, and nobody
# tells which. No controller steps it, and an averaging loop may average the buffers, sync them or leave them alone. So
# a copy looks at its weights: as long as they are those it was made with (judged by a sample, in whatever
# dtype), it is a snapshot and keeps its number of zeros. Once they have moved it takes the number of the model
# it was copied from, as that stands now (its "pace"), and the threshold from its own weights. After a load, it is a
# snapshot if the threshold that came with the weights is the one that fits them. A copy of a part of the model
# cannot know the threshold of the whole, and takes the original's.


@dataclass
class _Pace:
    """How far the model that a controller steps has got; its copies hold on to this, not to the model."""

    pruned: Tensor
    threshold: Tensor


class SharedThreshold(nn.Module):
    """The threshold of a group of weights, and how many of them it prunes.

    Buffers: ``threshold`` (0-dim float32) and ``pruned`` (0-dim int64, the exact number of zeros aimed at).
    They follow the model's device but never its dtype, and travel in its ``state_dict``, so that the
    ``state_dict`` alone is enough to evaluate the model and to bake it.

    Args:
        total: number of weights in the group.
        device: where the buffers live at first.
        caps: most zeros of a weight, by name, where there is such a limit.

    Attributes:
        aim: the number of zeros that the controller's schedule ends with.
        members: the parametrizations of the group, by the name that the weight had when it was sparsified.
        asked: the number of zeros as it was last set: ``pruned``, where nobody averages it and it needs no memory.
        theta: scale of the gradient of pruned weights, where it changes in time (a 0-dim float32 tensor).
        stale: whether weights were replaced, by a dense checkpoint, since the threshold was computed.
    """

    threshold: Tensor
    pruned: Tensor

    def __init__(self, total: int, device: torch.device | None = None, caps: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.total = total
        self.caps = dict(caps or {})
        self.aim = 0
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("pruned", torch.zeros((), dtype=torch.int64, device=device))
        self.members: dict[str, FeatherParametrization] = {}
        self.asked = 0
        self.theta = torch.ones((), dtype=torch.float32, device=device)
        self._theta = 1.0  # the number, for a model that is built on the meta device
        self.stale = False
        self._arrived: set[str] = set()  # members whose weights came with the dense checkpoint
        self._looked: dict[str, Tensor] = {}  # of a copy: samples of the weights that the threshold was computed from
        self._versions: list[list[tuple[int, int]]] = []  # and what tells of writes to them
        self._pace = _Pace(self.pruned, self.threshold)
        self._leader: _Pace | None = None  # of a copy
        self._sample: dict[str, Tensor] | None = None  # of a copy; see Note [Copies]

    @property
    def early(self) -> bool:
        """Whether this is the model that a controller steps, not a copy, and the end is yet to come.

        It has come where either the controller or the weights have got there: a controller at its end whose model was
        given the weights of an earlier, better step is no mistake.
        """
        reached = max(self.asked, int(self.pruned))
        return self._leader is None and not self.frozen and reached < self.aim

    @property
    def frozen(self) -> bool:
        """Whether masks stand in for the threshold."""
        return any(member.mask is not None for member in self.members.values())

    def masks(self) -> dict[str, Tensor]:
        """Return the masks of the frozen group, by name."""
        return {name: member.mask for name, member in self.members.items() if member.mask is not None}

    def weights(self) -> dict[str, Tensor]:
        """Return the dense weights of the group by name."""
        return {name: member.dense() for name, member in self.members.items()}

    def set(self, threshold: Tensor, pruned: int) -> None:
        """Take over a new threshold in place, so that every reader and compiled graph sees it."""
        self.take([Share(tuple(self.members), pruned, threshold)], pruned)

    def scale_gradient(self, theta: float) -> None:
        """Change the scale of the gradient of pruned weights, in place."""
        self._theta = theta
        self.theta.fill_(theta)

    def refresh(self, pruned: int, weights: Mapping[str, Tensor] | None = None) -> None:
        """Set the thresholds that prune this many of the group's weights as these are now."""
        self.take(allocate(self.weights() if weights is None else weights, pruned, self.caps), pruned)

    def rest(self) -> None:
        """Let masks stand in for the threshold, which becomes zero; copies made before go on by magnitude."""
        self._pace.threshold = self.threshold.clone()
        pruned = int(self.pruned)
        self._write([Share(tuple(self.members), pruned, torch.zeros_like(self.threshold))], pruned)

    @property
    def rests(self) -> bool:
        """Whether threshold and weights are those of a frozen group; its masks may still have to be found."""
        return not self.stale and bool(self.pruned) and not self.threshold

    def take(self, shares: Sequence[Share], pruned: int) -> None:
        """Take over what `allocate` returned for this many zeros; this group sets the pace now."""
        self._leader = self._sample = None
        self._write(shares, pruned)
        self._pace.pruned, self._pace.threshold = self.pruned, self.threshold

    def _write(self, shares: Sequence[Share], pruned: int) -> None:
        self.stale = False
        self._arrived.clear()
        self.asked = pruned
        alone = {share.names[0]: share.threshold for share in shares[1:]}
        with torch.no_grad():
            self.threshold.copy_(shares[0].threshold)
            self.pruned.fill_(pruned)
            for name in self.caps.keys() & self.members.keys():
                ceiling = self.members[name].ceiling
                assert ceiling is not None
                ceiling.fill_(NO_CEILING) if name not in alone else ceiling.copy_(alone[name])

    def _holds(self, shares: Sequence[Share]) -> bool:
        """Return whether these are the thresholds that stand."""
        alone = {share.names[0]: float(share.threshold) for share in shares[1:]}
        ceilings = {name: self.members[name].ceiling for name in self.caps}
        return float(shares[0].threshold) == float(self.threshold) and all(
            ceiling is not None and float(ceiling) == alone.get(name, NO_CEILING) for name, ceiling in ceilings.items()
        )

    def read(self, reader: FeatherParametrization) -> Tensor:
        """Return the threshold for a forward pass of one of the weights."""
        if (self.stale or self._leader is not None) and self.members:
            self._look(reader.member)
        return self.threshold

    @torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage] # it looks at values: not to be compiled
    def _look(self, member: FeatherParametrization) -> None:
        """Catch up if some weight was written to, or this one is not that from which the threshold was computed."""
        name, weight = member.name, member.dense()
        if isinstance(weight, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(weight):  # type: ignore[attr-defined]
            return  # it has no values that could be looked at
        written = self._versions != [other.versions() for other in self.members.values()]
        if self.stale or written or not _unmoved({name: self._looked[name]}, {name: weight}):
            self.catch_up()

    def catch_up(self) -> None:
        """Bring the threshold up to date with weights that no controller has seen; see Note [Copies]."""
        if self.frozen or (not self.stale and self._leader is None):
            return
        self._catch_up()
        if self._leader is not None:
            self._looked = _sample(self.weights())
            self._versions = [member.versions() for member in self.members.values()]

    def _catch_up(self) -> None:
        weights = self.weights()
        whole = sum(weight.numel() for weight in weights.values()) == self.total
        pruned = self.asked if self._sample is not None or self.pruned.is_meta else int(self.pruned)
        if self.stale:
            if whole:
                self._write(allocate(weights, pruned, self.caps), pruned)
                self._sample = None
            return
        assert self._leader is not None
        if self._sample is None:  # something was loaded
            if whole and (pruned == 0 or self._holds(allocate(weights, pruned, self.caps))):
                self.asked = pruned
                self._sample = _sample(weights)
                return
        elif _unmoved(self._sample, weights):
            if whole and any(weight.dtype != self._sample[name].dtype for name, weight in weights.items()):
                self._write(allocate(weights, pruned, self.caps), pruned)  # rounding has moved the threshold
                self._sample = _sample(weights)
            return
        if whole:
            pruned = int(self._leader.pruned)
            self._write(allocate(weights, pruned, self.caps), pruned)
        else:
            self._write([Share(tuple(weights), 0, self._leader.threshold)], pruned)

    def arrived(self, name: str) -> None:
        """Note that a member's weight was loaded; once all have come from a dense checkpoint, the threshold follows."""
        self._sample = None
        self._looked.clear()
        self._versions.clear()
        member = self.members[name]
        if member.mask is not None:
            member.find_mask() if self.rests else member.hold()
        elif self.stale:
            self._arrived.add(name)
            if self._arrived >= self.members.keys() and not any(w.is_meta for w in self.weights().values()):
                try:
                    self.catch_up()
                except ValueError:
                    self._arrived.clear()  # not finite: whoever uses these weights will hear of it, not who loads them

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self._leader is None and not self.frozen:
            self._pace.pruned, self._pace.threshold = self.pruned, self.threshold

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.frozen:
            self.threshold.zero_()  # a checkpoint of a model that was not frozen may have brought another one
        elif self.stale and not any(is_sharded(weight) for weight in self.weights().values()):
            # Not for good: who looks at the keys of an empty model (`to_empty`) fills it in later.
            with contextlib.suppress(ValueError):
                self.catch_up()
            self.stale = True
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedThreshold:
        with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode could never change
            twin = SharedThreshold(self.total, self.threshold.device, self.caps)
            twin.threshold.copy_(self.threshold)
            twin.pruned.copy_(self.pruned)
            twin.scale_gradient(self._theta)
        memo[id(self)] = twin
        twin.stale, twin.asked, twin.aim = self.stale, self.asked, self.aim
        twin._leader = self._leader or self._pace
        if self._leader is None:
            twin._sample = _sample(self.weights())
        elif self._sample is not None:
            twin._sample = dict(self._sample)
        return twin.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SharedThreshold:
        before = self.threshold
        super()._apply(fn, recurse)
        if before.is_meta and not self.threshold.is_meta:  # to_empty: the threshold follows from what is filled in
            self.threshold, self.pruned = self.threshold.float().zero_(), self.pruned.fill_(self.asked)
            self.stale = True
        elif self.threshold.dtype != torch.float32:  # .half(), .double(), .to(bfloat16): a rounded t is another t
            self.threshold = before.to(self.threshold.device)
        if self.theta.device != self.threshold.device:
            self.theta = torch.full((), self._theta, dtype=torch.float32, device=self.threshold.device)
        return self


def _sample(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return some elements of each weight."""
    samples: dict[str, Tensor] = {}
    for name, weight in weights.items():
        part: Any = weight.detach()
        part = part.to_local() if is_sharded(part) else part
        index = torch.arange(0, part.numel(), max(1, part.numel() // _SAMPLE), device=part.device)
        samples[name] = part.take(index)
    return samples


def _unmoved(samples: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(samples[name].to(new), new) for name, new in _sample(weights).items())

"""The registration of one of our parametrizations: its place, and the version of the weight behind its threshold."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.utils import parametrize

from feather_param.core.versions import Checksum, Version, checksum_of, version_of, writes_to
from feather_param.selection.stacked import through
from feather_param.selection.weights import Place, originals_of
from feather_param.utils.text import printable


class Reader(Protocol):
    """The part of a `FeatherParametrization` that the core uses."""

    threshold: Tensor
    mask: Tensor | None

    def restore_zeros(self) -> None: ...


@dataclass(eq=False)
class Registration:
    """One of our parametrizations in a model."""

    name: str  # of the weight when it was sparsified; tied places have the same
    place: Place
    reader: Reader  # our parametrization
    parametrizations: parametrize.ParametrizationList  # all parametrizations of the tensor, with its Parameters
    parameter_order: tuple[str, ...]  # names of the layer's Parameters before any parametrization
    written: Version = field(init=False)  # of the threshold's buffer at our last write
    memory: int | None = field(init=False, default=None)  # of a copy: address of the buffer at our last write
    computed_from: Version | None = None  # of the weight when its threshold was computed; None: it has changed
    checksum: Checksum | None = None  # of a copy: that of the weight when its threshold was computed

    def __post_init__(self) -> None:
        self.note_written()

    @property
    def originals(self) -> list[Tensor]:
        """The Parameters that the tensor is computed from. Most parametrizations take one."""
        return originals_of(self.parametrizations)

    @property
    def earlier(self) -> list[nn.Module]:
        """Other libraries' parametrizations that were registered before ours, in order."""
        return [*itertools.takewhile(lambda each: each is not self.reader, self.parametrizations)]

    @property
    def stacked(self) -> bool:
        """Whether the tensor has parametrizations besides ours."""
        return len(self.parametrizations) > 1

    @property
    def _inputs(self) -> list[Tensor]:
        """The tensors that the weight is computed from, with the Parameters of earlier parametrizations."""
        if not self.stacked:
            return self.originals
        return [*self.originals, *(tensor for each in self.earlier for tensor in each.parameters())]

    def dense(self) -> Tensor:
        """Return the weight that our parametrization gets: the output of the earlier ones."""
        return through(self.earlier, self.originals)

    def changed(self, or_replaced: bool = False) -> bool:
        """Return whether the weight was written to since its threshold was computed.

        Args:
            or_replaced: the result if a Parameter was replaced.
        """
        if self.computed_from is None:
            return True
        tensors = self._inputs
        if self.computed_from.replaced(tensors):
            return or_replaced
        return self.computed_from.writes != writes_to(tensors)

    def note_computed(self) -> None:
        """Note that the threshold was computed from the weight as it is now."""
        self.computed_from = version_of(self._inputs)

    def invalidate(self) -> None:
        """Mark the threshold as out of date."""
        self.computed_from = version_of(self._inputs).invalidated()

    def forget(self) -> None:
        """Mark the threshold as out of date, and drop the references to the Parameters: torch swaps no tensor with one.

        Forward passes do not compute the threshold then, as if another Parameter was in place (FSDP2 gathers one).
        """
        self.computed_from = version_of([]).invalidated()

    def note_written(self) -> None:
        """Note that we wrote the threshold's buffer."""
        self.written = version_of([self.reader.threshold])

    @property
    def buffer_replaced(self) -> bool:
        """Whether another tensor is in the place of the threshold's buffer, as in `torch.func.functional_call`."""
        return self.written.replaced([self.reader.threshold])

    @property
    def buffer_overwritten(self) -> bool:
        """Whether somebody else wrote to the threshold's buffer, as a moving average of all buffers does."""
        return self.reader.threshold._version != self.written.writes

    def for_copy(self, reader: Reader, memo: dict[int, Any]) -> Registration | None:
        """Return the registration of a copied parametrization, or None if its layer is not copied with it.

        Args:
            reader: the copied parametrization.
            memo: the memo of the deepcopy.
        """
        if not {id(self.parametrizations), id(self.place.module)} <= memo.keys():
            return None
        place = replace(self.place, module=memo[id(self.place.module)])
        copied = replace(self, place=place, reader=reader, parametrizations=memo[id(self.parametrizations)])
        copied.computed_from = None
        if all(id(tensor) in memo for tensor in self._inputs):
            version = version_of([memo[id(tensor)] for tensor in self._inputs])
            copied.computed_from = version.invalidated() if self.changed(or_replaced=True) else version
        copied.checksum = checksum_of(self.originals)
        return copied


def first_places(registrations: Iterable[Registration]) -> dict[str, Registration]:
    """Return the registration of the first place of each weight, by name.

    Raises:
        ValueError: two places no longer share the Parameters that they shared when they were sparsified.
    """
    first: dict[str, Registration] = {}
    for registration in registrations:
        other = first.setdefault(registration.name, registration)
        if other is registration:
            continue
        if any(a is not b for a, b in zip(other.originals, registration.originals, strict=True)):
            both = [each.place for each in (registration, other)]
            names = " and ".join(printable(place.name) for place in reversed(both))
            again = " = ".join(
                f"model.{place.name.removesuffix(place.tensor)}parametrizations.{place.tensor}.original"
                for place in both
            )
            raise ValueError(
                f"expected {names} to share one Parameter, as when they were "
                "sparsified, got two: load_state_dict(assign=True) unties them; load without, or tie them again: "
                f"{printable(again)}"
            )
    return first

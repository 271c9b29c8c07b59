"""Where one of our parametrizations is registered, and which weights its threshold was computed from."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn
from torch.nn.utils import parametrize

from feather_param.core.versions import Checksum, Version, version_of, writes_to
from feather_param.selection.stacked import through
from feather_param.selection.weights import Place, originals_of


class Reader(Protocol):
    """The part of a `FeatherParametrization` that the shared state writes and the forward pass reads."""

    threshold: Tensor
    mask: Tensor | None


@dataclass(eq=False)
class Registration:
    """One of our parametrizations in a model."""

    weight: str  # name of the weight when it was sparsified; tied places have the same
    place: Place
    reader: Reader  # our parametrization
    parametrizations: parametrize.ParametrizationList  # all parametrizations of the tensor, with its Parameters
    parameter_order: tuple[str, ...]  # names of the layer's Parameters before any parametrization
    written: Version = field(init=False)  # of the threshold's buffer, when we wrote it last
    computed_from: Version | None = None  # of the weight, when its threshold was computed; None: compute it again
    checksum: Checksum | None = None  # of a copy's weight, when its threshold was computed

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

    def dense(self) -> Tensor:
        """Return the weight that our parametrization gets: the output of the earlier ones."""
        return through(self.earlier, self.originals)

    def changed(self, or_replaced: bool = False) -> bool:
        """Return whether the weight was written to since its threshold was computed.

        Args:
            or_replaced: the result where other tensors are in the place of those that were there then.
        """
        if self.computed_from is None:
            return True
        tensors = self.inputs
        if self.computed_from.replaced(tensors):
            return or_replaced
        return self.computed_from.writes != writes_to(tensors)

    def note_computed(self) -> None:
        """Note that the threshold was computed from the weight as it is now."""
        self.computed_from = version_of(self.inputs)

    def invalidate(self) -> None:
        """Let `changed` return True for the tensors that are in place now."""
        self.computed_from = version_of(self.inputs)._replace(writes=-1)

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

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that the weight is computed from, with the Parameters of earlier parametrizations."""
        if not self.stacked:
            return self.originals
        return [*self.originals, *(tensor for each in self.earlier for tensor in each.parameters())]


def require_tied(registrations: Iterable[Registration]) -> None:
    """Refuse places that were tied when they were sparsified and no longer share their Parameters.

    Raises:
        ValueError: two places of a weight have different Parameters.
    """
    first: dict[str, Registration] = {}
    for registration in registrations:
        other = first.setdefault(registration.weight, registration)
        if other is registration:
            continue
        if any(a is not b for a, b in zip(other.originals, registration.originals, strict=True)):
            both = [each.place for each in (registration, other)]
            again = " = ".join(
                f"model.{place.name.removesuffix(place.tensor)}parametrizations.{place.tensor}.original"
                for place in both
            )
            raise ValueError(
                f"expected {other.place.name} and {registration.place.name} to share one Parameter, as when they were "
                "sparsified, got two: load_state_dict(assign=True) unties them; load without, or tie them again: "
                f"{again}"
            )


def require_values(registrations: Iterable[Registration]) -> None:
    """Refuse weights on the meta device.

    Raises:
        ValueError: a Parameter has no values.
    """
    for registration in registrations:
        if any(original.is_meta for original in registration.originals):
            raise ValueError(
                f"expected weights with values, got {registration.place.name} on the meta device; load them first"
            )

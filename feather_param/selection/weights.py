"""Prunable tensors of a model, and the places that use them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from feather_param.selection.adapters import why_dense
from feather_param.selection.names import full_name, names_of

LINEAR_AND_CONV = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*LINEAR_AND_CONV, *TRANSPOSED)
"""The layers whose weights are pruned by default, with their subclasses."""

# The input projections of `nn.MultiheadAttention` are Linear layers without a module of their own.
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Place:
    """One use of a tensor: an attribute of a module."""

    name: str  # of the tensor: "layer1.conv.weight"
    module: nn.Module
    tensor: str  # name of the attribute: "weight"
    adapter: str = ""  # why a layer of an adapter library stays dense by default

    @property
    def by_default(self) -> bool:
        """Whether the tensor is pruned without being named in ``include``."""
        if self.adapter:
            return False
        if isinstance(self.module, nn.MultiheadAttention):
            return self.tensor in _PROJECTIONS and bool(self.originals)
        return self.tensor == "weight" and isinstance(self.module, LAYERS)

    @property
    def parametrizations(self) -> parametrize.ParametrizationList | None:
        """The parametrizations of the tensor, or None if it has none."""
        return parametrizations_of(self.module).get(self.tensor)

    @property
    def originals(self) -> list[Tensor]:
        """The Parameters that the tensor is computed from.

        Without parametrizations, the Parameter itself. Empty if there is no Parameter.
        """
        own = self.parametrizations
        if own is None:
            return [value] if (value := self.module._parameters.get(self.tensor)) is not None else []
        return originals_of(own)

    @property
    def parameter(self) -> Tensor | None:
        """The Parameter that the tensor is computed from, or None if there are several or none."""
        return self.originals[0] if len(self.originals) == 1 else None

    def value(self) -> Tensor:
        """Return the tensor, computed through all its parametrizations."""
        return getattr(self.module, self.tensor)

    def outputs(self, shape: Sequence[int]) -> int:
        """Return the number of output features or channels that the tensor computes.

        This is the first dimension of the weight of a Linear or Conv layer. Transposed convolutions and embeddings have
        their outputs in the second one. Of a module that is not known, the first dimension is returned. A tensor of
        fewer than two dimensions counts as one output.

        Args:
            shape: the shape of the tensor.

        Example:
            >>> layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
            >>> Place("weight", layer, "weight").outputs(layer.weight.shape)
            6
        """
        if len(shape) < 2:
            return 1
        if isinstance(self.module, TRANSPOSED):
            return shape[1] * self.module.groups
        return shape[1 if isinstance(self.module, nn.Embedding | nn.EmbeddingBag) else 0]

    @property
    def key(self) -> int:
        """A number that tied places have in common."""
        return id(self if self.parameter is None else self.parameter)


@dataclass(frozen=True)
class Weight:
    """One prunable tensor with all the places that use it. It has the name of the first one."""

    places: tuple[Place, ...]

    @property
    def name(self) -> str:
        """Name of the first place."""
        return self.places[0].name

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.places[0].value().numel()


def parametrizations_of(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Return the parametrizations of a module by the name of the tensor.

    A wrapper may forward the attribute ``parametrizations`` of the module inside; that is ignored.
    """
    found = module._modules.get("parametrizations")
    lists: Any = found._modules if isinstance(found, nn.ModuleDict) else {}
    return lists


def originals_of(own: parametrize.ParametrizationList) -> list[Tensor]:
    """Return the Parameters that a list of parametrizations computes a tensor from."""
    if own._parameters:  # faster than the attributes; this runs in each forward pass
        return [*own._parameters.values()]  # type: ignore[list-item]
    return [own.original] if own.is_tensor else [getattr(own, f"original{i}") for i in range(own.ntensors)]


def places_of(model: nn.Module) -> Iterator[tuple[Place, list[str]]]:
    """Yield each tensor of each module once, with all names of the module."""
    names = names_of(model)
    known = {name for aliases in names.values() for name in aliases}
    for module, aliases in names.items():
        if "parametrizations" in aliases[0].split("."):
            continue
        tensors = dict.fromkeys(module._parameters)
        if isinstance(module, LAYERS):
            tensors["weight"] = None  # even if a hook or a quantiser has replaced the Parameter: `select` refuses it
        tensors.update(dict.fromkeys(parametrizations_of(module)))
        adapter = why_dense(aliases[0], known)
        for tensor in tensors:
            yield Place(full_name(aliases[0], tensor), module, tensor, adapter), aliases


def is_matrix(parameter: Tensor | None) -> bool:
    """Return whether a Parameter has two or more dimensions. Biases and norms have fewer."""
    return parameter is not None and not is_lazy(parameter) and parameter.dim() >= 2

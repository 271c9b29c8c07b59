"""The places of a model where a weight may lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from feather_param.selection.names import full_name, names_of

LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)

# The input projections of `nn.MultiheadAttention`: three Linear layers in all but class, in one tensor or three.
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Site:
    """One place where a weight is used: an attribute of a module."""

    name: str
    module: nn.Module
    tensor: str

    @property
    def by_default(self) -> bool:
        """Whether this is pruned unless something is said of it; other weights join by their own names."""
        if isinstance(self.module, nn.MultiheadAttention):
            return self.tensor in _PROJECTIONS and bool(self.originals)
        return self.tensor == "weight" and isinstance(self.module, LAYERS)

    @property
    def parametrizations(self) -> parametrize.ParametrizationList | None:
        """The parametrizations of this tensor, if it has any."""
        return parametrizations_of(self.module).get(self.tensor)

    @property
    def originals(self) -> list[Tensor]:
        """The Parameters that the tensor is computed from: itself, or those of parametrizations; else none."""
        own = self.parametrizations
        if own is None:
            return [value] if (value := self.module._parameters.get(self.tensor)) is not None else []
        return originals_of(own)

    @property
    def parameter(self) -> Tensor | None:
        """The one Parameter that it is computed from, if it is just one."""
        return self.originals[0] if len(self.originals) == 1 else None

    def dense(self) -> Tensor:
        """Return the tensor, past all parametrizations."""
        return getattr(self.module, self.tensor)

    @property
    def key(self) -> int:
        """What tied sites have in common."""
        return id(self if self.parameter is None else self.parameter)


@dataclass(frozen=True)
class Weight:
    """One prunable tensor and all the places that use it; named after the first."""

    sites: tuple[Site, ...]

    @property
    def name(self) -> str:
        return self.sites[0].name

    @property
    def numel(self) -> int:
        return self.sites[0].dense().numel()


def parametrizations_of(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Return a module's own parametrizations by tensor; a wrapper may hand out those of the module inside."""
    found = module._modules.get("parametrizations")
    places: Any = found._modules if isinstance(found, nn.ModuleDict) else {}
    return places


def originals_of(own: parametrize.ParametrizationList) -> list[Tensor]:
    """Return the Parameters that parametrizations compute a tensor from."""
    if own._parameters:  # looked up in each forward pass
        return [*own._parameters.values()]  # type: ignore[list-item]
    return [own.original] if own.is_tensor else [getattr(own, f"original{i}") for i in range(own.ntensors)]


def sites_of(model: nn.Module) -> Iterator[tuple[Site, list[str]]]:
    """Yield each tensor of each module once, with all the names of the module."""
    for module, aliases in names_of(model).items():
        if "parametrizations" in aliases[0].split("."):
            continue
        tensors = dict.fromkeys(module._parameters)
        if isinstance(module, LAYERS):
            tensors["weight"] = None  # also where a hook or a quantiser made it something else: `select` tells
        tensors.update(dict.fromkeys(parametrizations_of(module)))
        for tensor in tensors:
            yield Site(full_name(aliases[0], tensor), module, tensor), aliases


def is_matrix(parameter: Tensor | None) -> bool:
    """Whether a parameter is no bias and no norm: it has two dimensions or more."""
    return parameter is not None and not is_lazy(parameter) and parameter.dim() >= 2

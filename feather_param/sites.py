"""The places of a model where a weight may lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from feather_param.parametrizations import FeatherParametrization, originals

__all__ = ["LAYERS", "Site", "Weight", "full_name", "is_matrix", "names_of", "sites_of"]

LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


@dataclass(frozen=True)
class Site:
    """One place where a weight is used: an attribute of a module."""

    name: str
    module: nn.Module
    tensor: str

    @property
    def by_default(self) -> bool:
        """Whether this is pruned unless something is said of it; other weights join by their own names."""
        return self.tensor == "weight" and isinstance(self.module, LAYERS)

    @property
    def parameter(self) -> Tensor | None:
        """The dense weight, or None where it is not a plain (or plainly parametrized) parameter."""
        if parametrize.is_parametrized(self.module, self.tensor):
            return getattr(self.parametrizations, "original", None)
        return self.module._parameters.get(self.tensor)

    @property
    def originals(self) -> list[Tensor]:
        """The parameters that the weight is made from: itself, or what other parametrizations take."""
        if self.parameter is not None:
            return [self.parameter]
        if parametrize.is_parametrized(self.module, self.tensor):
            return list(originals(self.parametrizations))
        return []

    @property
    def parametrizations(self) -> parametrize.ParametrizationList:
        """The parametrizations of this tensor, ours among them once the model is sparsified."""
        plist = self.module.parametrizations[self.tensor]  # type: ignore[index]
        assert isinstance(plist, parametrize.ParametrizationList)
        return plist

    @property
    def feather(self) -> FeatherParametrization | None:
        """Our parametrization of this tensor, if it has one."""
        if not parametrize.is_parametrized(self.module, self.tensor):
            return None
        return next((p for p in self.parametrizations if isinstance(p, FeatherParametrization)), None)

    def dense(self) -> Tensor:
        """Return the weight that our parametrization sees: past those registered before it."""
        return getattr(self.module, self.tensor) if self.feather is None else self.feather.dense()

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

    @property
    def member(self) -> FeatherParametrization:
        """What stands for this weight in its group, once the model is sparsified."""
        feather = self.sites[0].feather
        if feather is None:
            raise RuntimeError(f"expected a sparsified weight, got the plain {self.name}")
        return feather.member


def sites_of(model: nn.Module) -> Iterator[tuple[Site, list[str]]]:
    """Yield each tensor of each module once, with all the names of the module."""
    for module, aliases in names_of(model).items():
        if "parametrizations" in aliases[0].split("."):
            continue
        tensors = dict.fromkeys(module._parameters)
        if isinstance(module, LAYERS):
            tensors["weight"] = None  # also where a hook or a quantiser made it something else: `select` tells
        if parametrize.is_parametrized(module):
            tensors.update(dict.fromkeys(module.parametrizations))  # type: ignore[arg-type]
        for tensor in tensors:
            yield Site(full_name(aliases[0], tensor), module, tensor), aliases


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return all the names that each module of a model has."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def full_name(module: str, tensor: str) -> str:
    """Return the name of a tensor of a module; the root's tensors have names without a dot."""
    return f"{module}.{tensor}" if module else tensor


def is_matrix(parameter: Tensor | None) -> bool:
    """Whether a parameter is no bias and no norm: it has two dimensions or more."""
    return parameter is not None and not is_lazy(parameter) and parameter.dim() >= 2

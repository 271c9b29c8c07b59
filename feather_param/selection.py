"""Which weights of a model are pruned: each tied weight once, and a reason for each that stays dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from feather_param.parametrizations import FeatherParametrization

__all__ = ["Filter", "Selection", "Site", "Weight", "select", "sparsified"]

Filter = str | Sequence[str] | Callable[[str, nn.Module], bool]
"""Glob patterns on names, or a predicate on (module name, module)."""

_LAYERS = (
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
    def parameter(self) -> Tensor | None:
        """The dense weight, or None where it is not a plain (or plainly parametrized) parameter."""
        if parametrize.is_parametrized(self.module, self.tensor):
            return getattr(self.parametrizations, "original", None)
        return self.module._parameters.get(self.tensor)

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


@dataclass(frozen=True)
class Selection:
    """The prunable weights in the model's order, and the names of those left dense with the reason."""

    weights: tuple[Weight, ...]
    skipped: dict[str, str] = field(default_factory=dict)


def select(
    model: nn.Module, include: Filter | None = None, exclude: Filter | None = None, min_params: int = 0
) -> Selection:
    """Choose the weights of a model to prune.

    By default these are the weights of all Linear, Conv and ConvTranspose layers and their subclasses. A pattern
    is matched against the module's name and the weight's (``"layer1.*"``, ``"*.conv1.weight"``); one whose
    last part names a tensor literally (``"*.c_attn.weight"``) selects that tensor in any kind of module, if it
    has two dimensions or more.

    Args:
        model: the model; it may itself be a layer.
        include: prune only what this matches.
        exclude: leave what this matches dense.
        min_params: leave weights with fewer elements dense.

    Raises:
        ValueError: a filter matches nothing, nothing is left to prune, a weight cannot be pruned, or
            ``include`` names only some of the layers that share a weight.
        TypeError: a filter is neither patterns nor a callable.
    """
    if already := sparsified(model):
        raise ValueError(
            f"expected a plain model, got one that is already sparsified (at {already[0].name}); "
            "call feather_param.desparsify(model) first, or go on with its controller"
        )
    included, excluded = _matcher(include, "include"), _matcher(exclude, "exclude")
    users: dict[int, list[Site]] = {}  # every use of every parameter, selected or not
    chosen: list[Site] = []
    skipped: dict[str, str] = {}
    matched_include = matched_exclude = False
    for site, aliases in _sites(model):
        parameter = site.parameter
        users.setdefault(site.key, []).append(site)
        default = site.tensor == "weight" and isinstance(site.module, _LAYERS)
        wanted = included(site, aliases, default) if included else default
        if not wanted:
            if default:
                skipped[site.name] = "not included"
            continue
        matched_include = True
        if excluded and excluded(site, aliases, True):
            matched_exclude = True
            skipped[site.name] = "excluded"
            continue
        _check(site)
        if parameter is not None and parameter.numel() < min_params:
            skipped[site.name] = f"fewer than {min_params} parameters"
            continue
        chosen.append(site)
    if include is not None and not matched_include:
        raise ValueError(_no_match("include", include, model))
    if exclude is not None and not matched_exclude:
        raise ValueError(_no_match("exclude", exclude, model))
    weights = _untie(chosen, users, skipped, strict=include is not None)
    if not weights:
        raise ValueError(
            f"expected a model with weights to prune, got {type(model).__name__} with none: "
            "it has no Linear or Conv layer, or min_params, include and exclude leave none"
        )
    return Selection(tuple(weights), skipped)


def sparsified(model: nn.Module) -> tuple[Weight, ...]:
    """Return the weights of a model that carry a `FeatherParametrization`, tied ones grouped."""
    by_parameter: dict[int, list[Site]] = {}
    for site, _ in _sites(model):
        if site.feather is not None:
            by_parameter.setdefault(site.key, []).append(site)
    return tuple(Weight(tuple(sites)) for sites in by_parameter.values())


def _sites(model: nn.Module) -> Iterator[tuple[Site, list[str]]]:
    """Yield each tensor of each module once, with all the names of the module."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for module, aliases in names.items():
        if "parametrizations" in aliases[0].split("."):
            continue
        tensors = dict.fromkeys(module._parameters)
        if isinstance(module, _LAYERS):
            tensors["weight"] = None  # also where a hook or a quantiser made it something else: `_check` tells
        if parametrize.is_parametrized(module):
            tensors.update(dict.fromkeys(module.parametrizations))  # type: ignore[arg-type]
        for tensor in tensors:
            yield Site(_join(aliases[0], tensor), module, tensor), aliases


def _join(module: str, tensor: str) -> str:
    return f"{module}.{tensor}" if module else tensor


def _matcher(rule: Filter | None, argument: str) -> Callable[[Site, list[str], bool], bool] | None:
    if rule is None:
        return None
    if callable(rule):
        predicate = rule
        return lambda site, aliases, default: default and any(predicate(name, site.module) for name in aliases)
    patterns = [rule] if isinstance(rule, str) else list(rule) if isinstance(rule, Iterable) else []
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"expected {argument} to be glob patterns or a predicate (name, module) -> bool, got {rule!r}")

    def matches(site: Site, aliases: list[str], default: bool) -> bool:
        matrix = site.parameter is not None and not is_lazy(site.parameter) and site.parameter.dim() >= 2
        for pattern in patterns:
            literal = matrix and pattern.rpartition(".")[2] == site.tensor
            for name in aliases:
                if fnmatchcase(_join(name, site.tensor), pattern) and (default or literal):
                    return True
                if default and fnmatchcase(name, pattern):
                    return True
        return False

    return matches


def _no_match(argument: str, rule: Filter, model: nn.Module) -> str:
    examples = [site.name for site, _ in _sites(model) if isinstance(site.module, _LAYERS) and site.tensor == "weight"]
    names = f"some of this model's names: {', '.join(examples[:3])}" if examples else "this model has no such layer"
    return f"expected {argument} to match a weight, got {rule!r}, which matches none; {names}"


def _check(site: Site) -> None:
    parameter = site.parameter
    hint = f"; leave it dense with exclude={site.name!r}"
    if parameter is not None and is_lazy(parameter):
        raise ValueError(f"expected initialised weights, got a lazy one at {site.name}; run one batch first")
    if not isinstance(parameter, Tensor) or not isinstance(parameter, nn.Parameter):
        if parametrize.is_parametrized(site.module, site.tensor):
            return
        found = type(getattr(site.module, site.tensor, None)).__name__
        raise ValueError(
            f"expected {site.name} to be an nn.Parameter, got {found}; "
            "old-style weight_norm, spectral_norm and prune hooks replace the parameter; use "
            f"torch.nn.utils.parametrizations instead, or remove them first{hint}"
        )
    if parameter.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ValueError(
            f"expected a weight of a real floating dtype at {site.name}, got {parameter.dtype}; "
            f"sparsify before quantising{hint}"
        )


def _untie(chosen: list[Site], users: dict[int, list[Site]], skipped: dict[str, str], strict: bool) -> list[Weight]:
    """Group the chosen sites by the tensor they share; a tensor also used elsewhere stays dense."""
    groups: dict[int, list[Site]] = {}
    for site in chosen:
        groups.setdefault(site.key, []).append(site)
    weights: list[Weight] = []
    for key, sites in groups.items():
        others = [user.name for user in users[key] if user not in sites]
        if not others:
            weights.append(Weight(tuple(sites)))
            continue
        tied = ", ".join(others)
        if strict:
            raise ValueError(
                f"expected include to name all the places of a tied weight, got {sites[0].name} without {tied}; "
                "include both, or neither"
            )
        for site in sites:
            skipped[site.name] = f"tied to {tied}, which is not selected"
    return weights

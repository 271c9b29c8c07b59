"""Which weights of a model are pruned: each tied weight once, and a reason for each that stays dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from feather_param.parametrizations import FeatherParametrization, originals
from feather_param.shards import is_sharded

__all__ = ["Filter", "Selection", "Site", "Weight", "names_of", "require_tied", "select", "sparsified"]

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


@dataclass(frozen=True)
class Selection:
    """The prunable weights in the model's order, and the names of those left dense with the reason."""

    weights: tuple[Weight, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of elements of each weight."""
        return {weight.name: weight.numel for weight in self.weights}


def select(
    model: nn.Module, include: Filter | None = None, exclude: Filter | None = None, min_params: int = 0
) -> Selection:
    """Choose the weights of a model to prune.

    By default these are the weights of all Linear, Conv and ConvTranspose layers and their subclasses. A pattern
    is matched against the module's name and the weight's (``"layer1.*"``, ``"*.conv1.weight"``); one whose
    last part is about a tensor (``"*.c_attn.weight"``, ``"lstm.weight_*"``) selects it in any kind of module, if it
    has two dimensions or more.

    Args:
        model: the model; it may itself be a layer.
        include: prune only what this matches.
        exclude: leave what this matches dense.
        min_params: leave weights with fewer elements dense.

    Raises:
        ValueError: a filter or one of its patterns matches nothing, nothing is left to prune, a weight cannot be
            pruned, or ``include`` names only some of the layers that share a weight.
        TypeError: a filter is neither patterns nor a callable.
    """
    if already := sparsified(model):
        raise ValueError(
            f"expected a plain model, got one that is already sparsified (at {already[0].name}); "
            "call feather_param.desparsify(model) first, or go on with its controller"
        )
    included = None if include is None else _Rule(include, "include")
    excluded = None if exclude is None else _Rule(exclude, "exclude")
    users: dict[int, list[Site]] = {}  # every use of every parameter, selected or not
    chosen: list[Site] = []
    skipped: dict[str, str] = {}
    for site, aliases in _sites(model):
        parameter = site.parameter
        users.setdefault(site.key, []).append(site)
        default = site.tensor == "weight" and isinstance(site.module, _LAYERS)
        wanted = included.matches(site, aliases, default) if included else default
        unwanted = excluded is not None and excluded.matches(site, aliases, wanted or default)
        if not wanted:
            if default:
                skipped[site.name] = "not included"
            elif include is None and _is_matrix(parameter):
                skipped[site.name] = f"a weight of {type(site.module).__name__}: name it in include to prune it"
            continue
        if unwanted:
            skipped[site.name] = "excluded"
            continue
        _check(site)
        if parameter is not None and parameter.numel() < min_params:
            skipped[site.name] = f"fewer than {min_params} parameters"
            continue
        chosen.append(site)
    for rule in (included, excluded):
        if rule is not None:
            rule.require_used(model)
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


def require_tied(weights: Sequence[Weight]) -> None:
    """Refuse weights that were tied when they were sparsified and no longer are."""
    found: dict[FeatherParametrization, Site] = {}
    for weight in weights:
        for site in weight.sites:
            other = found.setdefault(weight.member if site.feather is None else site.feather.member, site)
            if other.key != site.key:
                raise ValueError(
                    f"expected {other.name} and {site.name} to share one Parameter, as when they were sparsified, got "
                    "two: load_state_dict(assign=True) unties weights; tie them again, or load without assign"
                )


def _sites(model: nn.Module) -> Iterator[tuple[Site, list[str]]]:
    """Yield each tensor of each module once, with all the names of the module."""
    for module, aliases in names_of(model).items():
        if "parametrizations" in aliases[0].split("."):
            continue
        tensors = dict.fromkeys(module._parameters)
        if isinstance(module, _LAYERS):
            tensors["weight"] = None  # also where a hook or a quantiser made it something else: `_check` tells
        if parametrize.is_parametrized(module):
            tensors.update(dict.fromkeys(module.parametrizations))  # type: ignore[arg-type]
        for tensor in tensors:
            yield Site(_join(aliases[0], tensor), module, tensor), aliases


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return all the names that each module of a model has."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _join(module: str, tensor: str) -> str:
    return f"{module}.{tensor}" if module else tensor


class _Rule:
    """An ``include`` or ``exclude``: which sites it matches, and which of its patterns have matched any."""

    def __init__(self, rule: Any, argument: str) -> None:
        self._predicate = rule if callable(rule) else None
        patterns = [rule] if isinstance(rule, str) else list(rule) if isinstance(rule, Iterable) else []
        if self._predicate is None and (not patterns or not all(isinstance(pattern, str) for pattern in patterns)):
            raise TypeError(
                f"expected {argument} to be glob patterns or a predicate (name, module) -> bool, got {rule!r}"
            )
        self._argument = argument
        self._patterns = patterns
        self._unused: dict[Any, None] = dict.fromkeys([rule] if self._predicate else patterns)

    def matches(self, site: Site, aliases: list[str], default: bool) -> bool:
        if self._predicate is not None:
            found = [self._predicate] if default and any(self._predicate(name, site.module) for name in aliases) else []
        else:
            found = [pattern for pattern in self._patterns if _fits(pattern, site, aliases, default)]
        for pattern in found:
            self._unused.pop(pattern, None)
        return bool(found)

    def require_used(self, model: nn.Module) -> None:
        """Refuse a rule with a pattern that matched nothing: a typing error would prune, or spare, the wrong layer."""
        if not self._unused:
            return
        layers = [s.name for s, _ in _sites(model) if isinstance(s.module, _LAYERS) and s.tensor == "weight"]
        names = f"some of this model's names: {', '.join(layers[:3])}" if layers else "this model has no such layer"
        missed = ", ".join(repr(pattern) for pattern in self._unused)
        raise ValueError(f"expected {self._argument} to match a weight, got {missed}, which matches none; {names}")


def _fits(pattern: str, site: Site, aliases: list[str], default: bool) -> bool:
    last = pattern.rpartition(".")[2]
    by_name = _is_matrix(site.parameter) and last.strip("*?") and fnmatchcase(site.tensor, last)
    for name in aliases:
        if fnmatchcase(_join(name, site.tensor), pattern) and (default or by_name):
            return True
        if default and fnmatchcase(name, pattern):
            return True
    return False


def _is_matrix(parameter: Tensor | None) -> bool:
    return parameter is not None and not is_lazy(parameter) and parameter.dim() >= 2


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
    if is_sharded(parameter):
        raise ValueError(
            f"expected a model that is not yet wrapped, got {site.name} sharded over processes; "
            "the order is: sparsify(model), then DDP or fully_shard, then the optimizer"
        )
    if isinstance(site.module, nn.Embedding | nn.EmbeddingBag):
        for option in ("sparse", "max_norm"):
            if getattr(site.module, option):
                raise ValueError(
                    f"expected an embedding without {option}=, got {option}={getattr(site.module, option)} at "
                    f"{site.name}: it writes to the weight past the parametrization, or needs sparse gradients{hint}"
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

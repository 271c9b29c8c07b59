"""Which weights of a model are pruned: each tied weight once, and a reason for each that stays dense."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from feather_param.ops.distributed import is_sharded
from feather_param.parametrizations import states_of
from feather_param.selection.globs import Filter, Rule
from feather_param.selection.weights import Site, Weight, is_matrix, sites_of
from feather_param.utils.checks import integer
from feather_param.utils.text import grouped


@dataclass(frozen=True)
class Selection:
    """The prunable weights in the model's order, and the names of those left dense with the reason."""

    weights: tuple[Weight, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    def dense(self) -> dict[str, Tensor]:
        """Return the weights by name."""
        return {weight.name: weight.sites[0].dense().detach() for weight in self.weights}

    @property
    def sizes(self) -> dict[str, int]:
        """Number of elements of each weight."""
        return {weight.name: weight.numel for weight in self.weights}


def select(
    model: nn.Module, include: Filter | None = None, exclude: Filter | None = None, min_params: int = 0
) -> Selection:
    """Choose the weights of a model to prune.

    By default these are the weights of all Linear, Conv and ConvTranspose layers and their subclasses, and the input
    projections of ``nn.MultiheadAttention``. A pattern
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
        TypeError: the model is no nn.Module, or a filter is neither patterns nor a callable.
    """
    _check_model(model)
    min_params = integer("min_params", min_params, 0)
    if already := [place.site.name for shared in states_of(model) for place in shared.places.values()]:
        raise ValueError(
            f"expected a plain model, got one that is already sparsified (at {already[0]}); "
            "call feather_param.desparsify(model) first, or go on with its controller"
        )
    included = None if include is None else Rule(include, "include")
    excluded = None if exclude is None else Rule(exclude, "exclude")
    users: dict[int, list[Site]] = {}  # every use of every parameter, selected or not
    chosen: list[Site] = []
    skipped: dict[str, str] = {}
    nameable: list[Site] = []
    for site, aliases in sites_of(model):
        parameter = site.parameter
        users.setdefault(site.key, []).append(site)
        default = site.by_default
        wanted = included.matches(site, aliases, default) if included else default
        unwanted = excluded is not None and excluded.matches(site, aliases, wanted or default)
        if not wanted:
            if default:
                skipped[site.name] = "not included"
            elif include is None and is_matrix(parameter):
                skipped[site.name] = f"a weight of {type(site.module).__name__}: name it in include to prune it"
                nameable.append(site)
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
            f"{_why_none(skipped, nameable)}"
        )
    return Selection(tuple(weights), skipped)


def _why_none(skipped: dict[str, str], nameable: list[Site]) -> str:
    """Return the reasons of those that stay dense, and a pattern that would take some."""
    names = {site.name for site in nameable}
    reasons = grouped({name: reason for name, reason in skipped.items() if name not in names})
    why = reasons[:3] + ([f"{len(reasons) - 3} more"] if len(reasons) > 3 else [])
    if nameable:
        # Embeddings last: they are seldom meant, and often tied.
        first = min(nameable, key=lambda site: isinstance(site.module, nn.Embedding | nn.EmbeddingBag)).name
        parts = first.split(".")
        pattern = ".".join(["*", *parts[-2:]]) if len(parts) > 2 else first
        why.append(f"weights of other layers join by name, for example include={pattern!r} ({len(names)} in all)")
    return "; ".join(why) or "it has no Linear or Conv layer, and no other Parameter of two or more dimensions"


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"expected a model of plain modules, got {type(module).__name__} at {name or 'the root'}; "
                "sparsify before scripting, and script after desparsify"
            )
        for cls in type(module).__mro__:
            if cls.__module__.startswith(("torch.distributed.fsdp", "torch.nn.parallel.distributed")):
                raise ValueError(
                    f"expected a model that is not yet wrapped, got {cls.__name__} at {name or 'the root'}; "
                    "the order is: sparsify(model), then DDP or fully_shard, then the optimizer"
                )


def _check(site: Site) -> None:
    parameter = site.parameter
    hint = f"; leave it dense with exclude={site.name!r}"
    if parameter is not None and is_lazy(parameter):
        raise ValueError(f"expected initialised weights, got a lazy one at {site.name}; run one batch first")
    if not isinstance(parameter, Tensor) or not isinstance(parameter, nn.Parameter):
        if site.parametrizations is not None:
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
            both = [user.name for user in users[key]]
            raise ValueError(
                f"expected include to name all the places of a tied weight, got {sites[0].name} without {tied}; "
                f"include both, as include={both} does (others need their patterns beside these), or neither"
            )
        for site in sites:
            skipped[site.name] = f"tied to {tied}, which is not selected"
    return weights

"""Baking: dense weights with exact zeros in the place of parametrized ones."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from feather_param.parametrizations import SharedThreshold, feather_threshold, originals
from feather_param.selection import Site, Weight
from feather_param.thresholds import PruneCount, count_pruned, kth_magnitude
from feather_param.warning import warn_of_dead

__all__ = ["bake", "baked"]


def bake(weights: Sequence[Weight]) -> None:
    """Write the exact zeros into the Parameters and remove our parametrizations; on an error nothing changes."""
    values = _values(weights)
    for weight in weights:
        site = weight.sites[0]
        _inverted(site, copy.deepcopy(_before(site)), values[weight.name])  # raises before anything is written
    for weight in weights:
        site = weight.sites[0]
        tensors = _inverted(site, _before(site), values[weight.name])
        with torch.no_grad():
            for parameter, tensor in zip(originals(site.parametrizations), tensors, strict=True):
                parameter.copy_(tensor)
        for site in weight.sites:
            _remove(site)


def _before(site: Site) -> list[nn.Module]:
    """Return the parametrizations registered before ours: by other libraries."""
    return list(itertools.takewhile(lambda parametrization: parametrization is not site.feather, site.parametrizations))


def _inverted(site: Site, before: Sequence[nn.Module], value: Tensor) -> list[Tensor]:
    """Return the originals from which the parametrizations before ours make `value`."""
    with torch.no_grad():
        tensors: Any = value
        for parametrization in reversed(before):
            tensors = parametrization.right_inverse(tensors)  # type: ignore[operator]
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        # A normalisation of nothing but zeros is 0 / 0: there the old direction stays, its length becomes 0.
        undefined = _through(before, tensors).isnan()
        tensors = [
            torch.where(undefined, old, new) if new.shape == undefined.shape else new
            for old, new in zip(originals(site.parametrizations), tensors, strict=True)
        ]
        if not torch.equal(_through(before, tensors) == 0, value == 0):
            names = ", ".join(type(parametrization).__name__ for parametrization in before)
            raise ValueError(
                f"expected the other parametrizations of {site.name} ({names}) to be able to hold its zeros, but they "
                "give another weight; take them off before sparsify (parametrize.remove_parametrizations)"
            )
    return tensors


def _through(parametrizations: Sequence[nn.Module], tensors: Sequence[Tensor]) -> Tensor:
    for parametrization in parametrizations:
        tensors = [parametrization(*tensors)]
    (value,) = tensors
    return value


def baked(model: nn.Module, weights: Sequence[Weight]) -> dict[str, Tensor]:
    """Return the state_dict that `bake` would leave, keys in the plain model's order."""
    values = _values(weights)
    owned: dict[str, dict[str, Tensor | None]] = {}  # module prefix -> its tensors, in the plain module's order
    for weight in weights:
        for site in weight.sites:
            if len(site.parametrizations) > 1:
                raise ValueError(
                    f"expected {site.name} to carry no parametrization but ours, got another library's too; "
                    "desparsify a copy.deepcopy(model) and take its state_dict"
                )
            prefix = site.name[: -len(site.tensor)]
            order = site.feather.parameter_order if site.feather else ()
            owned.setdefault(prefix, dict.fromkeys(order))[site.tensor] = values[weight.name]
    old = model.state_dict()
    new: OrderedDict[str, Tensor] = OrderedDict()
    pending = sorted(owned, key=len)
    for key, tensor in old.items():
        for prefix in [prefix for prefix in pending if key.startswith(prefix)]:
            pending.remove(prefix)
            for name, value in owned[prefix].items():
                value = old.get(prefix + name) if value is None else value
                if value is not None:
                    new[prefix + name] = value
        if not any(key.startswith(f"{prefix}parametrizations.") for prefix in owned):
            new.setdefault(key, tensor)
    metadata = getattr(old, "_metadata", {})
    new._metadata = {  # type: ignore[attr-defined]
        key: value for key, value in metadata.items() if "parametrizations" not in key.split(".")
    }
    return new


def _values(weights: Sequence[Weight]) -> dict[str, Tensor]:
    """Return the baked value of each weight, by name."""
    groups: dict[SharedThreshold, list[Weight]] = {}
    for weight in weights:
        feather = weight.sites[0].feather
        assert feather is not None
        groups.setdefault(feather.shared, []).append(weight)
    values: dict[str, Tensor] = {}
    dead: list[str] = []
    for shared, group in groups.items():
        shared.catch_up()
        dense = {weight.name: weight.sites[0].dense().detach() for weight in group}
        total = sum(tensor.numel() for tensor in dense.values())
        if total != shared.total:
            raise ValueError(
                f"expected the whole model that was sparsified, {shared.total} prunable weights, got a part of it "
                f"with {total}: desparsify the whole (or a copy of it), then take the part"
            )
        k = int(shared.pruned)
        threshold = kth_magnitude(dense, k)
        counts = count_pruned(dense, threshold, k)
        for weight in group:
            feather = weight.sites[0].feather
            assert feather is not None
            values[weight.name] = _cut(dense[weight.name], threshold, feather.p, counts[weight.name])
        dead += [name for name, count in counts.items() if 0 < dense[name].numel() == count.zeros]
    warn_of_dead(dead)
    return values


def _cut(weight: Tensor, threshold: Tensor, p: float, count: PruneCount) -> Tensor:
    """Return P(weight) with exactly ``count.zeros`` zeros."""
    threshold = threshold.to(weight.device)
    with torch.no_grad():
        value = feather_threshold(weight, threshold, p=p)
        magnitude = weight.float().abs()
        # Position decides between ties; `cumsum` counts in the order of the elements, whatever the memory format.
        tied = magnitude == threshold
        rank = tied.flatten().cumsum(0).view(tied.shape)
        kept = (magnitude > threshold) | (tied & (rank > count.ties))
        # What is kept but came out as zero (a tie, or fp16 underflow) becomes the smallest number there is.
        return torch.where(kept & (value == 0), weight.sign() * _smallest(weight.dtype), value)


def _smallest(dtype: torch.dtype) -> float:
    """Return the smallest magnitude that survives arithmetic in a dtype.

    Subnormals are flushed to zero on some devices, except in float16, whose smallest normal number, 6e-5, is
    too large to stand for nothing.
    """
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps if dtype == torch.float16 else info.smallest_normal


# Note [Removing only ours, from one copy]
# `parametrize.remove_parametrizations` would remove every library's parametrization, and deletes the property from
# the layer's class, which `deepcopy` shares between copies: the other copies would lose their weight. So
# the parametrization is taken out by hand, and no class is ever changed: the layer goes back to its original class,
# or, where other tensors of it stay parametrized, to a new class without this property.


def _remove(site: Site) -> None:
    """Take our parametrization off a tensor; see Note [Removing only ours, from one copy]."""
    module, plist, feather = site.module, site.parametrizations, site.feather
    assert feather is not None
    if len(plist) > 1:
        del plist[list(plist).index(feather)]
        return
    (original,) = originals(plist)
    by_name: nn.ModuleDict = module.parametrizations  # type: ignore[assignment]
    del by_name[site.tensor]
    cls = type(module)
    if len(by_name):
        attributes = {name: value for name, value in vars(cls).items() if name != site.tensor}
        module.__class__ = type(cls.__name__, cls.__bases__, attributes)  # type: ignore[assignment]
    else:
        del module.parametrizations
        module.__class__ = cls.__bases__[0]
    module.register_parameter(site.tensor, original)
    parameters = module._parameters
    order = [name for name in feather.parameter_order if name in parameters]
    order += [name for name in parameters if name not in order]
    module._parameters = {name: parameters[name] for name in order}

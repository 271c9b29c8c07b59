"""Baking: dense weights with exact zeros in the place of parametrized ones."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from feather_param.allocation import allocate, count_zeros
from feather_param.checkpoints import forget_dense
from feather_param.groups import SharedThreshold
from feather_param.parametrizations import FeatherParametrization, originals
from feather_param.recurrent import keep_weights_after_forward
from feather_param.selection import Site, Weight, names_of, require_tied
from feather_param.shards import held_here, is_sharded, whole
from feather_param.thresholding import feather_threshold, smallest_kept
from feather_param.thresholds import PruneCount, require_finite
from feather_param.warning import warn_of_dead, warn_of_early

__all__ = ["bake", "baked", "check_other_parametrizations", "freeze", "hold", "remove", "survivors"]


def bake(weights: Sequence[Weight]) -> None:
    """Write the exact zeros into the Parameters and remove our parametrizations; on an error nothing changes."""
    _refuse_shards(weights)
    values = _values(weights)
    for shared in {weight.member.shared for weight in weights}:
        if shared.early:
            warn_of_early("desparsify()", int(shared.pruned), shared.aim)
    _write(weights, values)
    remove([site for weight in weights for site in weight.sites])


def remove(sites: Sequence[Site]) -> None:
    """Take our parametrizations and all that belongs to them off."""
    for site in sites:
        _remove(site)
    for site in sites:
        forget_dense(site.module)
        keep_weights_after_forward(site.module)


def freeze(weights: Sequence[Weight]) -> None:
    """Write the exact zeros into the Parameters and hold them there by a mask; on an error nothing changes."""
    _refuse_shards(weights)
    with torch.inference_mode(False):  # else the masks could not be part of a later backward pass
        _write(weights, _values(weights))
        for weight in weights:
            weight.member.find_mask()
        for shared in {weight.member.shared for weight in weights}:
            shared.rest()


def hold(weights: Sequence[Weight]) -> None:
    """Make the zeros of frozen weights zero again, after an optimizer step has moved them."""
    for weight in weights:
        weight.member.hold()
    stacked = [weight for weight in weights if len(weight.sites[0].parametrizations) > 1]
    if stacked:
        _write(stacked, {weight.member: _masked(weight.member) for weight in stacked})


def check_other_parametrizations(weights: Sequence[Weight]) -> None:
    """Refuse plain weights of which other libraries' parametrizations could not hold a pruned version."""
    for weight in weights:
        site = weight.sites[0]
        if parametrize.is_parametrized(site.module, site.tensor) and not site.originals[0].is_meta:
            dense = site.dense().detach()
            value = feather_threshold(dense, dense.abs().float().median())
            _inverted(site, copy.deepcopy(_before(site)), value)


def _refuse_shards(weights: Sequence[Weight]) -> None:
    for weight in weights:
        if any(is_sharded(original) for original in originals(weight.sites[0].parametrizations)):
            raise ValueError(
                f"expected whole weights, got {weight.name} sharded over processes; "
                "call baked_state_dict(model) on every process, and load what it returns into a plain model"
            )


def _write(weights: Sequence[Weight], values: dict[FeatherParametrization, Tensor]) -> None:
    for weight in weights:
        site = weight.sites[0]
        _inverted(site, copy.deepcopy(_before(site)), values[weight.member])  # raises before anything is written
    for weight in weights:
        site = weight.sites[0]
        tensors = _inverted(site, _before(site), values[weight.member])
        with torch.no_grad():
            for parameter, tensor in zip(originals(site.parametrizations), tensors, strict=True):
                parameter.copy_(tensor)


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
        made = _through(before, tensors)
        rounding = 100 * torch.finfo(value.dtype).eps
        if not (torch.equal(made == 0, value == 0) and torch.allclose(made, value, rtol=rounding, atol=0.0)):
            names = ", ".join(type(parametrization).__name__ for parametrization in before)
            raise ValueError(
                f"expected the other parametrizations of {site.name} ({names}) to be able to hold zeros, but they "
                "make another weight of them; take them off before sparsify (parametrize.remove_parametrizations), "
                f"or leave the weight dense with exclude={site.name!r}"
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
    prefixes = names_of(model)
    owned: dict[str, dict[str, Tensor | None]] = {}  # module prefix -> its tensors, in the plain module's order
    for weight in weights:
        for site in weight.sites:
            if len(site.parametrizations) > 1:
                raise ValueError(
                    f"expected {site.name} to carry no parametrization but ours, got another library's too; "
                    "desparsify a copy.deepcopy(model) and take its state_dict"
                )
            order = site.feather.parameter_order if site.feather else ()
            for name in prefixes[site.module]:
                prefix = f"{name}." if name else ""
                owned.setdefault(prefix, dict.fromkeys(order))[site.tensor] = values[weight.member]
    state = model.state_dict()
    ours = tuple(
        f"{prefix}parametrizations.{name}."
        for prefix, tensors in owned.items()
        for name, value in tensors.items()
        if value is not None
    )
    old = {key: tensor if key.startswith(ours) else whole(tensor) for key, tensor in state.items()}
    new: OrderedDict[str, Tensor] = OrderedDict()
    pending = sorted(owned, key=len)
    for key, tensor in old.items():
        for prefix in [prefix for prefix in pending if key.startswith(prefix)]:
            pending.remove(prefix)
            for name, value in owned[prefix].items():
                value = old.get(prefix + name) if value is None else value
                if value is not None:
                    new[prefix + name] = value
        if not key.startswith(ours):
            new.setdefault(key, tensor)
    metadata = getattr(state, "_metadata", {})
    new._metadata = {  # type: ignore[attr-defined]
        key: value for key, value in metadata.items() if "parametrizations" not in key.split(".")
    }
    return new


def survivors(weights: Sequence[Weight]) -> dict[str, Tensor]:
    """Return which elements of each weight `bake` would leave, by the name it was sparsified under."""
    return {member.name: value != 0 for member, value in _values(weights).items()}


def _values(weights: Sequence[Weight]) -> dict[FeatherParametrization, Tensor]:
    """Return the baked value of each weight; whole, also where it is sharded."""
    require_tied(weights)
    groups: dict[SharedThreshold, list[str]] = {}
    for weight in weights:
        groups.setdefault(weight.member.shared, []).append(weight.member.name)
    values: dict[FeatherParametrization, Tensor] = {}
    for shared, names in groups.items():
        dense = {name: shared.members[name].dense().detach() for name in names}
        total = sum(tensor.numel() for tensor in dense.values())
        if total != shared.total:
            raise ValueError(
                f"expected the whole model that was sparsified, {shared.total} prunable weights, got a part of it "
                f"with {total}: desparsify the whole (or a copy of it), then take the part; "
                "if a layer was replaced after sparsify, put the old one back"
            )
        parts, add_up = held_here(dense)
        require_finite(parts, add_up)
        found = _frozen(shared, dense) if shared.frozen else _pruned(shared, dense)
        values.update({shared.members[name]: value for name, value in found.items()})
    begun = [weight for weight in weights if weight.numel and int(weight.member.shared.pruned)]
    warn_of_dead([weight.name for weight in begun if not values[weight.member].any()])
    return values


def _frozen(shared: SharedThreshold, dense: dict[str, Tensor]) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for name in shared.masks():
        values[name] = _masked(shared.members[name], whole(dense[name]))
    return values


def _masked(member: FeatherParametrization, dense: Tensor | None = None) -> Tensor:
    dense = member.dense().detach() if dense is None else dense
    assert member.mask is not None
    return torch.where(member.mask, torch.where(dense == 0, smallest_kept(dense.dtype), dense), 0.0)


def _pruned(shared: SharedThreshold, dense: dict[str, Tensor]) -> dict[str, Tensor]:
    shared.catch_up()
    shares = allocate(dense, int(shared.pruned), shared.caps)
    counts = count_zeros(dense, shares)
    thresholds = {name: share.threshold for share in shares for name in share.names}
    return {
        name: _cut(whole(weight), thresholds[name], shared.members[name].p, counts[name])
        for name, weight in dense.items()
    }


def _cut(weight: Tensor, threshold: Tensor, p: float, count: PruneCount) -> Tensor:
    """Return P(weight) with exactly ``count.zeros`` zeros."""
    threshold = threshold.to(weight.device)
    with torch.no_grad():
        value = feather_threshold(weight, threshold, p=p)
        magnitude = weight.abs().float()
        # Position decides between ties; `cumsum` counts in the order of the elements, whatever the memory format.
        tied = magnitude == threshold
        kept = magnitude > threshold
        if int(tied.sum()) > count.ties:
            rank = tied.flatten().cumsum(0).view(tied.shape)
            kept |= tied & (rank > count.ties)
        # What is kept but came out as zero (a tie, or fp16 underflow) becomes the smallest number there is.
        return torch.where(kept & (value == 0), weight.sign() * smallest_kept(weight.dtype), value)


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

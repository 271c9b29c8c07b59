"""Baking: the masks first, then dense weights with exact zeros in the place of parametrized ones."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from feather_param.core.attach import detach
from feather_param.core.state_dict import of_sparsified
from feather_param.ops.distributed import is_sharded, whole
from feather_param.ops.dtypes import rounded_down, smallest_kept
from feather_param.ops.operator import feather_threshold
from feather_param.parametrizations import Place, SharedSparsity, states_of, through, with_zeros
from feather_param.reports.report import Report, rows, warn_of_dead
from feather_param.selection.names import full_name, names_of, without_wrappers
from feather_param.selection.weights import Weight
from feather_param.utils.warn import warn_of_early


def bake(model: nn.Module) -> None:
    """Write the exact zeros into the Parameters and remove our parametrizations; on an error nothing changes."""
    states = _whole_states(model)
    for shared in states:
        refuse_shards(shared)
    values = {shared: final_values(shared) for shared in states}
    for shared in states:
        if shared.source is None and not shared.frozen and shared.position.zeros < shared.aim:
            warn_of_early("desparsify()", shared.position.zeros, shared.aim)
    for shared in states:
        write(shared, values[shared])
        detach(shared)


def baked(model: nn.Module) -> dict[str, Tensor]:
    """Return the state_dict that `bake` would leave, keys in the plain model's order."""
    names = names_of(model)
    found: dict[str, tuple[Place, Tensor]] = {}  # by the name of the Parameter
    ours: set[str] = set()  # names of modules that are not in the plain model, with a dot behind
    for shared in _whole_states(model):
        values = final_values(shared)
        for place in shared.places.values():
            if len(place.parametrizations) > 1:
                raise ValueError(
                    f"expected {place.site.name} to carry no parametrization but ours, got another library's too; "
                    "desparsify a copy.deepcopy(model) and take its state_dict"
                )
            for name in names[place.site.module]:
                ours.add(full_name(name, f"parametrizations.{place.site.tensor}."))
                found[full_name(name, f"parametrizations.{place.site.tensor}.original")] = place, values[place.name]
    state = model.state_dict()
    bare = {without_wrappers(key): key for key in found if key not in state}  # some wrappers hide their names
    layers: dict[str, dict[str, Tensor | None]] = {}  # tensors of a layer in the plain order, by prefix of its entries
    gone: set[str] = set()
    for key in state:
        if at := found.pop(key if key in found else bare.pop(without_wrappers(key), ""), None):
            prefix, _, tensor = key.removesuffix(".original").rpartition("parametrizations.")
            value = at[1].to(state[key].device, state[key].dtype)
            layers.setdefault(prefix, dict.fromkeys(at[0].parameter_order))[tensor] = value
            gone.add(f"{prefix}parametrizations.{tensor}.")
    new: OrderedDict[str, Tensor] = OrderedDict()
    for key, tensor in state.items():
        above = _above(key)
        for prefix in above:
            for name, value in layers.pop(prefix, {}).items():
                value = whole(state.get(prefix + name)) if value is None else value
                if value is not None:
                    new[prefix + name] = value
        if gone.isdisjoint(above) and key not in new:
            new[key] = whole(tensor)
    if found or of_sparsified(new):
        raise ValueError(
            "expected the model's state_dict() to hold the weights under the names that torch gives them, got other "
            f"names for {next(iter(found), 'a copy')}; desparsify a copy.deepcopy(model) and take its state_dict"
        )
    metadata = getattr(state, "_metadata", {})
    left = [key for key in metadata if ours.isdisjoint(_above(f"{key}."))]
    empty = {_above(name)[-2][:-1] for name in ours} - {key.rpartition(".")[0] for key in left}
    new._metadata = {key: metadata[key] for key in left if key not in empty}  # type: ignore[attr-defined]
    return new


def _above(key: str) -> list[str]:
    """Return the prefixes of a name that end with a dot, and the empty one."""
    return ["", *(key[: i + 1] for i, letter in enumerate(key) if letter == ".")]


def final_masks(model: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
    """Return which elements `bake` would leave, by the layer and the name of its tensor."""
    found: dict[tuple[nn.Module, str], Tensor] = {}
    for shared in _whole_states(model):
        shared.settle()
        masks = shared.masks()
        found |= {(place.site.module, place.site.tensor): masks[place.name] for place in shared.places.values()}
    return found


def final_values(shared: SharedSparsity) -> dict[str, Tensor]:
    """Return what `bake` would leave of each weight, by name; whole, also where it is sharded."""
    shared.settle()
    kept = shared.masks()
    thresholds = shared.position.thresholds
    values: dict[str, Tensor] = {}
    for name, dense in shared.weights().items():
        weight = whole(dense.detach())
        mask, least = kept[name].to(weight.device), smallest_kept(weight.dtype)
        with torch.no_grad():
            if shared.frozen:
                values[name] = with_zeros(weight, mask)
            else:
                threshold = rounded_down(thresholds[name], weight.dtype).to(weight.device)
                value = feather_threshold(weight, threshold, p=shared.config.p)
                # What is kept but came out as zero (a tie, or an underflow) becomes the smallest number there is.
                value = torch.where(value == 0, weight.sign() * least, value)
                values[name] = torch.where(mask, value, 0.0)
    if shared.position.zeros:
        warn_of_dead(Report(rows(values, shared.counts())))
    return values


def write(shared: SharedSparsity, values: Mapping[str, Tensor]) -> None:
    """Write values into the Parameters that weights are computed from; on an error nothing is written."""
    todo: list[Place] = []
    for place in reversed(shared.places.values()):  # the first place of a tied weight comes last, and counts
        if place.name in values:
            _inverted(place.name, place.originals, copy.deepcopy(place.before), values[place.name])  # raises
            todo.append(place)
    for place in todo:
        with torch.no_grad():
            tensors = _inverted(place.name, place.originals, place.before, values[place.name])
            for parameter, tensor in zip(place.originals, tensors, strict=True):
                parameter.copy_(tensor)


def refuse_shards(shared: SharedSparsity) -> None:
    """Refuse weights that are sharded over processes."""
    for place in shared.places.values():
        if any(map(is_sharded, place.originals)):
            raise ValueError(
                f"expected whole weights, got {place.name} sharded over processes; "
                "call baked_state_dict(model) on every process, and load what it returns into a plain model"
            )


def check_other_parametrizations(weights: Sequence[Weight]) -> None:
    """Refuse plain weights of which other libraries' parametrizations could not hold a pruned version."""
    for weight in weights:
        site = weight.sites[0]
        if site.parametrizations is not None and not site.originals[0].is_meta:
            dense = site.dense().detach()
            value = feather_threshold(dense, dense.abs().float().median())
            _inverted(site.name, site.originals, copy.deepcopy(list(site.parametrizations)), value)


def _whole_states(model: nn.Module) -> list[SharedSparsity]:
    """Return what the parametrizations of a model share; a part of what was sparsified together is refused."""
    modules = set(model.modules())
    for shared in (states := states_of(model)):
        names = {place.name for feather, place in shared.places.items() if feather in modules}
        if not shared.places.keys() <= modules or (shared.source is None and not shared.whole):
            here = sum(shared.budget.sizes[name] for name in names)
            raise ValueError(
                f"expected the whole model that was sparsified, {shared.budget.total} prunable weights, got a part of "
                f"it with {here}: desparsify the whole (or a copy of it), then take the part; "
                "if a layer was replaced after sparsify, put the old one back"
            )
    return states


def _inverted(name: str, originals: Sequence[Tensor], before: Sequence[nn.Module], value: Tensor) -> list[Tensor]:
    """Return the originals from which the parametrizations before ours make `value`."""
    with torch.no_grad():
        tensors: Any = value
        for parametrization in reversed(before):
            tensors = parametrization.right_inverse(tensors)  # type: ignore[operator]
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        # A normalisation of nothing but zeros is 0 / 0: there the old direction stays, its length becomes 0.
        undefined = through(before, tensors).isnan()
        tensors = [
            torch.where(undefined, old, new) if new.shape == undefined.shape else new
            for old, new in zip(originals, tensors, strict=True)
        ]
        made = through(before, tensors)
        rounding = 100 * torch.finfo(value.dtype).eps
        if not (torch.equal(made == 0, value == 0) and torch.allclose(made, value, rtol=rounding, atol=0.0)):
            names = ", ".join(type(parametrization).__name__ for parametrization in before)
            raise ValueError(
                f"expected the other parametrizations of {name} ({names}) to be able to hold zeros, but they "
                "make another weight of them; take them off before sparsify (parametrize.remove_parametrizations), "
                f"or leave the weight dense with exclude={name!r}"
            )
    return tensors

"""Baking: compute the masks, then the dense weights with exact zeros, and replace the parametrized weights by them."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from feather_param.core.attach import detach
from feather_param.core.exact_values import exact_value
from feather_param.core.registration import Registration, first_places
from feather_param.core.shared import SharedSparsity
from feather_param.core.state_dict import of_sparsified
from feather_param.core.warnings import warn_of_dead, warn_of_early
from feather_param.ops.distributed import is_sharded, whole
from feather_param.ops.masking import with_exact_zeros
from feather_param.ops.memory import require_own_elements, require_own_memory
from feather_param.parametrizations import states_of
from feather_param.selection.names import full_name, names_of, without_wrappers
from feather_param.selection.stacked import invert
from feather_param.utils.text import printable


def bake(model: nn.Module) -> None:
    """Write the exact zeros into the Parameters and remove our parametrizations. On an error nothing changes."""
    states = _whole_states(model)
    require_writable(states)
    values = {shared: final_values(shared) for shared in states}
    for shared in states:
        if shared.source is None and not shared.frozen and shared.position.zeros < shared.final_zeros:
            warn_of_early("desparsify()", shared.position.zeros, shared.final_zeros)
    for shared in states:
        write(shared, values[shared])
        detach(shared)


def baked(model: nn.Module) -> dict[str, Tensor]:
    """Return the state_dict that the model would have after `bake`, with its keys in the order of the plain model."""
    values, ours = _values_by_key(model)
    state = model.state_dict()
    bare = {without_wrappers(key): key for key in values if key not in state}  # some wrappers hide their names
    layers: dict[str, dict[str, Tensor | None]] = {}  # by prefix: its tensors in the plain order; None: not pruned
    stacked: dict[str, Tensor] = {}  # Parameters of other libraries' parametrizations
    dropped: set[str] = set()  # prefixes of entries that a plain model does not have
    for key in state:
        if found := values.pop(key if key in values else bare.pop(without_wrappers(key), ""), None):
            registration, value = found
            value = value.to(state[key].device, state[key].dtype)
            own = key.rpartition("original")[0]
            prefix, _, tensor = own[:-1].rpartition("parametrizations.")
            if registration.stacked:
                stacked[key] = value
            else:
                layers.setdefault(prefix, dict.fromkeys(registration.parameter_order))[tensor] = value
            dropped.add(own + _ours_in(registration))
    new = with_plain_entries(state, layers, dropped)
    new.update(stacked)
    if values or of_sparsified(new):
        raise ValueError(
            "expected the model's state_dict() to hold the weights under the names that torch gives them, got other "
            f"names for {printable(next(iter(values), 'a copy'))}; desparsify a copy.deepcopy(model) and take its "
            "state_dict"
        )
    set_plain_metadata(new, getattr(state, "_metadata", {}), ours)
    return new


def _values_by_key(model: nn.Module) -> tuple[dict[str, tuple[Registration, Tensor]], set[str]]:
    """Return the final weights by the names of their Parameters, and the prefixes of our modules."""
    names = names_of(model)
    found: dict[str, tuple[Registration, Tensor]] = {}
    ours: set[str] = set()
    for shared in _whole_states(model):
        values = final_values(shared)
        for each in shared.registrations.values():
            tensors = {"original": values[each.name]}
            if each.stacked:
                tensors = _values_of_stacked(each, values[each.name])
            for name in names[each.place.module]:
                prefix = full_name(name, f"parametrizations.{each.place.tensor}.")
                ours.add(prefix + _ours_in(each))
                found.update({prefix + key: (each, tensor) for key, tensor in tensors.items()})
    return found, ours


def _ours_in(registration: Registration) -> str:
    """Return the prefix of our entries among those of all parametrizations of a weight."""
    return f"{len(registration.earlier)}." if registration.stacked else ""


def _values_of_stacked(registration: Registration, value: Tensor) -> dict[str, Tensor]:
    """Return the Parameters from which the other parametrizations of a weight compute a value, by their names."""
    originals, earlier = registration.originals, registration.earlier
    if any(map(is_sharded, originals)) or len(registration.parametrizations) > len(earlier) + 1:
        raise ValueError(
            f"expected {printable(registration.place.name)} to carry no parametrization but ours if it is sharded, and "
            "none after ours, got another library's; remove it (parametrize.remove_parametrizations), or exclude the "
            "weight"
        )
    tensors = invert(registration.name, originals, copy.deepcopy(earlier), value)
    if registration.parametrizations.is_tensor:
        return {"original": tensors[0]}
    return {f"original{i}": tensor for i, tensor in enumerate(tensors)}


def with_plain_entries(
    state: Mapping[str, Tensor], layers: Mapping[str, Mapping[str, Tensor | None]], dropped: set[str]
) -> OrderedDict[str, Tensor]:
    """Return a state with the entries of plain layers in the place of those of sparsified layers.

    Args:
        state: the state_dict of a sparsified model.
        layers: for each sparsified layer, by its prefix: its tensors in the plain order; None: the one in the state.
        dropped: prefixes of entries that a plain model does not have.
    """
    remaining = dict(layers)
    new: OrderedDict[str, Tensor] = OrderedDict()
    for key, tensor in state.items():
        prefixes = _prefixes(key)
        for prefix in prefixes:
            for name, value in remaining.pop(prefix, {}).items():
                if value is not None:
                    new[prefix + name] = value
                elif prefix + name in state:
                    new[prefix + name] = whole(state[prefix + name])
        if dropped.isdisjoint(prefixes) and key not in new:
            new[key] = whole(tensor)
    return new


def set_plain_metadata(new: OrderedDict[str, Tensor], metadata: Mapping[str, Any], ours: set[str]) -> None:
    """Give a state the metadata of torch (versions of modules) without that of our modules, by their prefixes."""
    remaining = [key for key in metadata if ours.isdisjoint(_prefixes(f"{key}."))]
    empty = {_prefixes(name)[-2][:-1] for name in ours} - {key.rpartition(".")[0] for key in remaining}
    new._metadata = {key: metadata[key] for key in remaining if key not in empty}  # type: ignore[attr-defined]


def _prefixes(key: str) -> list[str]:
    """Return the prefixes of a name that end with a dot, after the empty one."""
    return ["", *itertools.accumulate(f"{part}." for part in key.split(".")[:-1])]


def final_masks(model: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
    """Return the masks that `bake` would use, by the layer and the name of its tensor."""
    found: dict[tuple[nn.Module, str], Tensor] = {}
    for shared in _whole_states(model):
        shared.refresh_checked()
        masks = shared.masks()
        for each in shared.registrations.values():
            found[each.place.module, each.place.tensor] = masks[each.name]
    return found


def final_values(shared: SharedSparsity) -> dict[str, Tensor]:
    """Return the weights that `bake` would write, by name. Sharded weights are gathered."""
    shared.refresh_checked()
    config, masks, thresholds = shared.config, shared.masks(), shared.position.thresholds
    values: dict[str, Tensor] = {}
    for name, dense in shared.weights().items():
        weight = whole(dense.detach())
        if shared.frozen:
            with torch.no_grad():
                values[name] = with_exact_zeros(weight, masks[name].to(weight.device))
        else:
            values[name] = exact_value(weight, masks[name], thresholds[name], config.pattern, config.p)
    if shared.position.zeros:
        warn_of_dead(values, shared.counts(), config)
    return values


def write(shared: SharedSparsity, values: Mapping[str, Tensor]) -> None:
    """Write values into the Parameters that the weights are computed from. On an error nothing is written.

    Args:
        shared: the shared state.
        values: some of the weights by name, with their zeros.

    Raises:
        ValueError: parametrizations of other libraries cannot compute these weights.
    """
    todo: list[Registration] = []
    for each in reversed(shared.registrations.values()):  # of a tied weight, the first place is written last
        if each.name in values:
            for original in each.originals:
                require_own_elements(each.place.name, original)
            invert(each.name, each.originals, copy.deepcopy(each.earlier), values[each.name])  # raises
            todo.append(each)
    for each in todo:
        with torch.no_grad():
            tensors = invert(each.name, each.originals, each.earlier, values[each.name])
            for parameter, tensor in zip(each.originals, tensors, strict=True):
                parameter.copy_(tensor)


def require_writable(states: Iterable[SharedSparsity]) -> None:
    """Refuse weights into which exact zeros cannot be written.

    Raises:
        ValueError: a weight is sharded over processes, is an inference tensor, shares memory with another one, or is no
            longer tied.
    """
    for shared in states:
        first_places(shared.registrations.values())  # refuses weights that are no longer tied
    every = [each for shared in states for each in shared.registrations.values()]
    originals = [(each.place.name, original) for each in every for original in each.originals]
    for name, original in originals:
        if is_sharded(original):
            raise ValueError(
                f"expected whole weights, got {printable(name)} sharded over processes; "
                "call baked_state_dict(model) on every process, and load what it returns into a plain model"
            )
        if original.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"expected weights that can be written, got {printable(name)}, made in torch.inference_mode(); "
                "load it outside of inference mode, or call baked_state_dict(model)"
            )
    require_own_memory(originals)


def _whole_states(model: nn.Module) -> list[SharedSparsity]:
    """Return the shared states of a model. Refuse a part of a model that was sparsified as a whole, unless a copy."""
    modules = set(model.modules())
    for shared in (states := states_of(model)):
        names = {each.name for feather, each in shared.registrations.items() if feather in modules}
        if not shared.registrations.keys() <= modules or (shared.source is None and not shared.complete):
            here = sum(shared.budget.sizes[name] for name in names)
            raise ValueError(
                f"expected the whole model that was sparsified, {shared.budget.total} prunable weights, got a part of "
                f"it with {here}: desparsify the whole (or a copy of it), then take the part; "
                "if a layer was replaced after sparsify, put the old one back"
            )
    return states

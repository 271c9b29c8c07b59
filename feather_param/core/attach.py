"""Our parametrization and what belongs to it: put on a model, and taken off."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from feather_param.core import recurrent
from feather_param.core.state_dict import accept_dense
from feather_param.parametrizations import FeatherParametrization, Place, SharedSparsity
from feather_param.selection.names import names_of
from feather_param.selection.weights import Weight, parametrizations_of

# Note [The class of a parametrized layer]
# torch gives each parametrized layer a class of its own, which has the weight as a property, and takes it away with the
# last parametrization. What we need of a layer are methods of that class: they are gone with it, whoever removes the
# parametrization. Copies of a layer share its class, and so it is never changed after that: where only ours is removed,
# by `remove_parametrizations`, the layer gets another class. (torch's own function of that name deletes the property
# from the class, and with it the weight of all copies, and removes every library's parametrization.)


def attach(model: nn.Module, shared: SharedSparsity, weights: Sequence[Weight]) -> None:
    """Register a `FeatherParametrization` at all places of some weights of a model; on an error none."""
    sites = [(weight.name, site) for weight in weights for site in weight.sites]
    before = {site.module: (type(site.module), tuple(site.module._parameters)) for _, site in sites}
    try:
        for name, site in sites:
            layer = site.module
            if parametrizations_of(layer) and _METHODS not in vars(type(layer)):  # its copies share its class
                layer.__class__ = _class_like(type(layer))
                setattr(type(layer), _BEFORE, before[layer][0])
            feather = FeatherParametrization(shared)
            # unsafe: the check would run the operator, and our shapes and dtypes are right by construction.
            parametrize.register_parametrization(layer, site.tensor, feather, unsafe=True)
            place = parametrizations_of(layer)[site.tensor]
            shared.places[feather] = Place(name, site, place, before[layer][1])
            layer._modules["parametrizations"].train(layer.training)  # type: ignore[union-attr]
            if _METHODS not in vars(type(layer)):  # another tensor of the layer came first
                methods = _methods(layer)
                for key, value in {**methods, _METHODS: tuple(methods)}.items():
                    setattr(type(layer), key, value)
        in_order = [module for module in model.modules() if isinstance(module, FeatherParametrization)]
        shared.enter({feather: shared.places[feather] for feather in in_order})
    except BaseException:
        detach(shared)
        for layer, (cls, _) in before.items():
            layer.__class__ = cls  # of one that took a class, but no parametrization
        raise


def detach(shared: SharedSparsity) -> None:
    """Take all the parametrizations of a model off."""
    for place in list(shared.places.values()):
        remove_parametrizations(place.site.module, place.site.tensor)


def remove_parametrizations(layer: nn.Module, tensor: str) -> None:
    """Take our parametrization off a tensor of a layer (``"weight"``), which keeps its dense weight.

    Like `torch.nn.utils.parametrize.remove_parametrizations`, but other libraries' parametrizations of the layer stay,
    and copies of the layer stay as they are.
    """
    places = parametrizations_of(layer)
    place = places[tensor]
    feather = _ours(place)
    assert feather is not None
    known = feather.shared.places.pop(feather, None)
    if len(place) > 1:
        del place[list(place).index(feather)]
        _leave_class(layer, ())
        return
    original = place.original
    del places[tensor]
    if places:
        _leave_class(layer, (tensor,))
    else:
        del layer._modules["parametrizations"]
        layer.__class__ = type(layer).__bases__[0]
    layer.register_parameter(tensor, original)  # type: ignore[arg-type]
    parameters = layer._parameters
    order = [name for name in (known.parameter_order if known else ()) if name in parameters]
    layer._parameters = {name: parameters[name] for name in dict.fromkeys([*order, *parameters])}
    if not places:
        recurrent.plain_again(layer)


def links(model: nn.Module, shared: SharedSparsity) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return what leads from a model to the parametrizations of its layers: (module, name of a child, child)."""
    names = names_of(model)
    found: dict[tuple[nn.Module, str], nn.Module] = {}
    for place in shared.places.values():
        module = model
        for name in (*filter(None, names[place.site.module][0].split(".")), "parametrizations", place.site.tensor):
            found[module, name] = child = module.get_submodule(name)
            module = child
    return [(module, name, child) for (module, name), child in found.items()]


def require_attached(
    call: str, model: nn.Module, shared: SharedSparsity, known: list[tuple[nn.Module, str, nn.Module]]
) -> None:
    """Refuse a call if some of the parametrizations are no longer in the model: a layer was replaced, for example.

    What `links` returned is looked at first, and renewed where a part of the model was wrapped since.
    """
    if shared.places and all(module._modules.get(name) is child for module, name, child in known):
        return
    here = set(model.modules())
    gone = [place.site.name for feather, place in shared.places.items() if feather not in here]
    if len(gone) == len(shared.places):
        raise RuntimeError(f"expected {call} before desparsify, got it after: the model is plain again")
    if gone:
        raise RuntimeError(
            f"expected {call} on the model that was sparsified, got it without the parametrization of "
            f"{', '.join(gone)}: the layer was replaced, or the parametrization was removed; put the old layer back, "
            "or take the others off as well (feather_param.core.attach.remove_parametrizations) and sparsify anew"
        )
    known[:] = links(model, shared)


def _ours(place: Iterable[nn.Module]) -> FeatherParametrization | None:
    return next((each for each in place if isinstance(each, FeatherParametrization)), None)


_METHODS = "_feather_param_methods"
_BEFORE = "_feather_param_before"


def _methods(layer: nn.Module) -> dict[str, Any]:
    """Return what the class of a parametrized layer needs beyond what torch gives it; they call the plain class."""
    plain: Any = type(layer).__bases__[0]

    def _load_from_state_dict(self: nn.Module, state_dict: Any, prefix: str, *args: Any) -> None:
        alone = [name for name, place in parametrizations_of(self).items() if len(place) == 1 and _ours(place)]
        accept_dense(state_dict, prefix, alone)
        plain._load_from_state_dict(self, state_dict, prefix, *args)

    def _save_to_state_dict(self: nn.Module, destination: Any, prefix: str, keep_vars: bool) -> None:
        plain._save_to_state_dict(self, destination, prefix, keep_vars)
        for tensor in parametrizations_of(self):  # pruned weights, which a layer's own method takes for its entries
            destination.pop(prefix + tensor, None)

    def __deepcopy__(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        twin = self.__new__(type(self))  # a layer's own method would copy the pruned weight, a temporary tensor
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    methods = {"_load_from_state_dict": _load_from_state_dict, "_save_to_state_dict": _save_to_state_dict}
    if "__deepcopy__" not in vars(type(layer)):  # torch adds one, unless the layer has its own
        methods["__deepcopy__"] = __deepcopy__
    return methods | recurrent.methods(layer)


def _class_like(cls: type, without: Collection[str] = ()) -> type:
    return type(cls.__name__, cls.__bases__, {key: value for key, value in vars(cls).items() if key not in without})


def _leave_class(layer: nn.Module, gone: Collection[str]) -> None:
    """Give a layer that stays parametrized a class without some tensors, and without our methods if we are gone."""
    cls, places = type(layer), parametrizations_of(layer)
    if any(_ours(place) for place in places.values()):
        layer.__class__ = _class_like(cls, gone)
        return
    before = vars(cls).get(_BEFORE)
    if before is not None and places.keys() <= vars(before).keys():
        layer.__class__ = before
    else:
        layer.__class__ = _class_like(cls, {*gone, _BEFORE, _METHODS, *vars(cls).get(_METHODS, ())})

"""Registration of our parametrizations on a model, and their removal.

Note [The class of a parametrized layer]

torch gives each parametrized layer a class of its own, with the weight as a property, and restores the plain class when
the last parametrization is removed. The methods that we need on a layer are methods of that class. So they disappear
with it, also if torch or another library removes the parametrization.

Copies of a layer share its class, so the class must not change later. Where other parametrizations stay,
`remove_parametrizations` gives the layer another class. (torch's function of that name deletes the property from the
class, which breaks all copies, and removes the parametrizations of other libraries as well.)
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from feather_param.core import recurrent
from feather_param.core.registration import Registration
from feather_param.core.shared import SharedSparsity
from feather_param.core.state_dict import accept_plain
from feather_param.parametrizations import FeatherParametrization, states_of
from feather_param.selection.names import full_name, names_of
from feather_param.selection.weights import Weight, parametrizations_of
from feather_param.utils.text import listed, printable

_METHODS = "_feather_param_methods"  # attribute of a layer's class: the names of our methods
_BEFORE = "_feather_param_before"  # attribute of a layer's class: the class before ours was made


def require_plain(model: nn.Module) -> None:
    """Refuse a model that is sparsified already.

    Raises:
        ValueError: a layer has our parametrization.
    """
    if already := [each.place.name for shared in states_of(model) for each in shared.registrations.values()]:
        raise ValueError(
            f"expected a plain model, got one that is already sparsified (at {printable(already[0])}); "
            "call feather_param.desparsify(model) first, or go on with its controller"
        )


def attach(model: nn.Module, shared: SharedSparsity, weights: Sequence[Weight]) -> None:
    """Register a `FeatherParametrization` at all places of some weights. On an error the model is untouched."""
    places = [(weight.name, place) for weight in weights for place in weight.places]
    before = {place.module: (type(place.module), tuple(place.module._parameters)) for _, place in places}
    shared.aliases = _aliases(model, weights)
    try:
        for name, place in places:
            layer = place.module
            if parametrizations_of(layer) and _METHODS not in vars(type(layer)):  # its copies share this class
                layer.__class__ = _class_like(type(layer))
                setattr(type(layer), _BEFORE, before[layer][0])
            feather = FeatherParametrization(shared)
            # unsafe: the check would run the operator, which keeps shapes and dtypes anyway.
            parametrize.register_parametrization(layer, place.tensor, feather, unsafe=True)
            found = parametrizations_of(layer)[place.tensor]
            shared.registrations[feather] = Registration(name, place, feather, found, before[layer][1])
            layer._modules["parametrizations"].train(layer.training)  # type: ignore[union-attr]
            if _METHODS not in vars(type(layer)):  # the first of the layer's tensors
                methods = _methods(layer)
                for key, value in {**methods, _METHODS: tuple(methods)}.items():
                    setattr(type(layer), key, value)
        in_order = [module for module in model.modules() if isinstance(module, FeatherParametrization)]
        shared.registrations = {feather: shared.registrations[feather] for feather in in_order}
        owner = in_order[0]
        owner.add_module("shared", owner.__dict__.pop("shared").train(owner.training))
    except BaseException:
        detach(shared)
        for layer, (cls, _) in before.items():
            layer.__class__ = cls  # a layer may have got a class, but no parametrization
        raise


def _aliases(model: nn.Module, weights: Sequence[Weight]) -> dict[str, tuple[str, ...]]:
    """Return the other names of each weight, by its name: those of its other places, and of modules used twice."""
    names = names_of(model)
    found: dict[str, tuple[str, ...]] = {}
    for weight in weights:
        every = [full_name(name, place.tensor) for place in weight.places for name in names[place.module]]
        found[weight.name] = tuple(name for name in every if name != weight.name)
    return found


def detach(shared: SharedSparsity) -> None:
    """Remove all parametrizations with a shared state."""
    for each in list(shared.registrations.values()):
        remove_parametrizations(each.place.module, each.place.tensor)


def remove_parametrizations(layer: nn.Module, tensor: str) -> None:
    """Remove our parametrization from a tensor of a layer (``"weight"``), which keeps its dense weight.

    Like `torch.nn.utils.parametrize.remove_parametrizations`, but parametrizations of other libraries stay, and copies
    of the layer do not change.
    """
    lists = parametrizations_of(layer)
    own = lists[tensor]
    feather = _ours(own)
    assert feather is not None
    registration = feather.shared.registrations.pop(feather, None)
    if len(own) > 1:
        del own[list(own).index(feather)]
        _leave_class(layer, ())
        return
    original = own.original
    del lists[tensor]
    if lists:
        _leave_class(layer, (tensor,))
    else:
        del layer._modules["parametrizations"]
        layer.__class__ = type(layer).__bases__[0]
    layer.register_parameter(tensor, original)  # type: ignore[arg-type]
    parameters = layer._parameters
    order = [name for name in (registration.parameter_order if registration else ()) if name in parameters]
    layer._parameters = {name: parameters[name] for name in dict.fromkeys([*order, *parameters])}
    if not lists:
        recurrent.refill(layer)


Link = tuple[nn.Module, str, nn.Module]
"""A module, the name of a child, and the child."""


def links(model: nn.Module, shared: SharedSparsity) -> list[Link]:
    """Return the links that lead from a model to its parametrizations."""
    parents: dict[nn.Module, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for name, child in module._modules.items():
            if child is not None:
                parents.setdefault(child, (module, name))
    found: dict[nn.Module, Link] = {}
    for feather in shared.registrations:
        child = feather
        while child is not model and child not in found:
            module, name = parents[child]
            found[child] = module, name, child
            child = module
    return list(found.values())


def require_attached(call: str, model: nn.Module, shared: SharedSparsity, known: list[Link]) -> list[Link]:
    """Refuse a call if a parametrization is no longer in the model, for example because its layer was replaced.

    Args:
        call: the call, for the message: ``"step()"``.
        model: the model that was sparsified.
        shared: its shared state.
        known: the links at the last call. To check these is fast.

    Returns:
        The links now. They have changed if a part of the model was wrapped.

    Raises:
        RuntimeError: a parametrization is missing.
    """
    if shared.registrations and all(module._modules.get(name) is child for module, name, child in known):
        return known
    here = set(model.modules())
    missing = [each.place.name for feather, each in shared.registrations.items() if feather not in here]
    if len(missing) == len(shared.registrations):
        raise RuntimeError(f"expected {call} before desparsify, got it after: the model is plain again")
    if missing:
        raise RuntimeError(
            f"expected {call} on the model that was sparsified, got it without the parametrization of "
            f"{listed(missing)}: the layer was replaced, or the parametrization was removed; put the old layer "
            "back, or remove the others as well (feather_param.core.attach.remove_parametrizations) and sparsify again"
        )
    return links(model, shared)


def _ours(parametrizations: Iterable[nn.Module]) -> FeatherParametrization | None:
    return next((each for each in parametrizations if isinstance(each, FeatherParametrization)), None)


def _methods(layer: nn.Module) -> dict[str, Any]:
    """Return the methods that we add to the class of a parametrized layer. They call those of the plain class."""
    plain: Any = type(layer).__bases__[0]

    def _load_from_state_dict(self: nn.Module, state_dict: Any, prefix: str, *args: Any) -> None:
        alone = [name for name, own in parametrizations_of(self).items() if len(own) == 1 and _ours(own)]
        accept_plain(state_dict, prefix, alone)
        plain._load_from_state_dict(self, state_dict, prefix, *args)

    def _save_to_state_dict(self: nn.Module, destination: Any, prefix: str, keep_vars: bool) -> None:
        plain._save_to_state_dict(self, destination, prefix, keep_vars)
        for tensor in parametrizations_of(self):  # some layers' own methods save the pruned weight as well
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


def _leave_class(layer: nn.Module, removed: Collection[str]) -> None:
    """Give a layer that stays parametrized a class without the removed tensors.

    If none of our parametrizations is left, the class has none of our methods either.
    """
    cls, lists = type(layer), parametrizations_of(layer)
    if any(_ours(own) for own in lists.values()):
        layer.__class__ = _class_like(cls, removed)
        return
    before = vars(cls).get(_BEFORE)
    if before is not None and lists.keys() <= vars(before).keys():
        layer.__class__ = before
    else:
        layer.__class__ = _class_like(cls, {*removed, _BEFORE, _METHODS, *vars(cls).get(_METHODS, ())})

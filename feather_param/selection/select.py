"""The selection of the weights to prune, and the reasons why others stay dense."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from feather_param.ops.distributed import is_sharded
from feather_param.ops.values import why_without_values
from feather_param.selection.globs import Filter, Rule
from feather_param.selection.weights import Place, Weight, is_matrix, places_of
from feather_param.utils.checks import integer
from feather_param.utils.text import LONGEST_MESSAGE, grouped, listed, printable

_ORDER = "the order is: sparsify(model), then DDP or fully_shard, then the optimizer"


@dataclass(frozen=True)
class Selection:
    """The weights to prune, and those that stay dense.

    Attributes:
        weights: the weights to prune, in the model's order.
        skipped: names of the weights that stay dense, with the reasons.
        dense_by_default: names of the weights that stay dense although no argument says so.
    """

    weights: tuple[Weight, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    dense_by_default: frozenset[str] = frozenset()

    def dense(self) -> dict[str, Tensor]:
        """Return the weights by name."""
        return {weight.name: weight.places[0].value().detach() for weight in self.weights}

    @property
    def sizes(self) -> dict[str, int]:
        """Number of elements of each weight."""
        return {weight.name: weight.numel for weight in self.weights}


def select(
    model: nn.Module, include: Filter | None = None, exclude: Filter | None = None, min_params: int = 0
) -> Selection:
    """Choose the weights of a model to prune.

    By default these are the weights of all Linear, Conv and ConvTranspose layers and their subclasses, and the input
    projections of ``nn.MultiheadAttention``. The layers that peft adds stay dense (see `adapters.why_dense`).

    A glob is matched against the name of the module and that of the weight (``"layer1.*"``, ``"*.conv1.weight"``). A
    glob that ends with the name of a tensor (``"*.c_attn.weight"``, ``"lstm.weight_*"``) selects this tensor in any
    kind of module, if it has two or more dimensions.

    Args:
        model: the model. It may be a single layer.
        include: prune only what this matches.
        exclude: leave dense what this matches.
        min_params: leave weights with fewer elements dense.

    Raises:
        ValueError: a filter or one of its globs matches nothing, no weight is left to prune, a weight cannot be
            pruned, or ``include`` names only some of the layers that share a weight.
        TypeError: the model is no nn.Module, or a filter is neither globs nor a callable.
    """
    _check_model(model)
    min_params = integer("min_params", min_params, 0)
    included = None if include is None else Rule(include, "include")
    excluded = None if exclude is None else Rule(exclude, "exclude")
    users: dict[int, list[Place]] = {}  # all places of each Parameter, selected or not
    chosen: list[Place] = []
    skipped: dict[str, str] = {}
    by_name: list[Place] = []  # places that are pruned only if include names them
    for place, aliases in places_of(model):
        users.setdefault(place.key, []).append(place)
        default = place.by_default
        wanted = included.matches(place, aliases, default) if included else default
        unwanted = excluded is not None and excluded.matches(place, aliases, wanted or default or bool(place.adapter))
        if not wanted:
            if default:
                skipped[place.name] = "not included"
            elif include is None and is_matrix(place.parameter):
                why = place.adapter or f"a weight of {type(place.module).__name__}"
                skipped[place.name] = f"{why}: name it in include to prune it"
                if not place.adapter:
                    by_name.append(place)
            continue
        if unwanted:
            skipped[place.name] = "excluded"
            continue
        _check(place)
        if place.parameter is not None and place.parameter.numel() < min_params:
            skipped[place.name] = f"fewer than {min_params} parameters"
            continue
        chosen.append(place)
    for rule in (included, excluded):
        if rule is not None:
            rule.require_used(model)
    weights, tied = _group_tied(chosen, users, strict=include is not None)
    skipped |= tied
    if not weights:
        raise ValueError(
            f"expected a model with weights to prune, got {type(model).__name__} with none: "
            f"{_why_none(skipped, by_name)}"
        )
    return Selection(tuple(weights), skipped, frozenset({place.name for place in by_name} | tied.keys()))


def _why_none(skipped: dict[str, str], by_name: list[Place]) -> str:
    """Return why all weights stay dense, and a glob that would select some."""
    names = {place.name for place in by_name}
    reasons = grouped({name: reason for name, reason in skipped.items() if name not in names})
    why = reasons[:3] + ([f"{len(reasons) - 3} more"] if len(reasons) > 3 else [])
    if by_name:
        # Embeddings last: they are seldom meant, and often tied.
        first = min(by_name, key=lambda place: isinstance(place.module, nn.Embedding | nn.EmbeddingBag)).name
        parts = first.split(".")
        glob = ".".join(["*", *parts[-2:]]) if len(parts) > 2 else first
        why.append(
            f"weights of other layers are pruned if include names them, for example include={printable(repr(glob))} "
            f"({len(names)} in all)"
        )
    return "; ".join(why) or "it has no Linear or Conv layer, and no other Parameter of two or more dimensions"


def _check_model(model: object) -> None:
    """Refuse what is no module, scripted modules, and models in distributed wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"expected a model of plain modules, got {type(module).__name__} at {printable(name or 'the root')}; "
                "sparsify before scripting, and script after desparsify"
            )
        for cls in type(module).__mro__:
            if cls.__module__.startswith(("torch.distributed.fsdp", "torch.nn.parallel.distributed")):
                raise ValueError(
                    f"expected a model that is not yet wrapped, got {cls.__name__} at {printable(name or 'the root')}; "
                    f"{_ORDER}"
                )


def _check(place: Place) -> None:
    """Refuse a tensor that cannot be parametrized or pruned."""
    parameter = place.parameter
    name, hint = printable(place.name), f"; leave it dense with exclude={printable(repr(place.name))}"
    if parameter is not None and is_lazy(parameter):
        raise ValueError(f"expected initialised weights, got a lazy one at {name}; run one batch first")
    for original in place.originals:
        if not original.is_meta and (why := why_without_values(original)):
            raise ValueError(
                f"expected weights with values, or on the meta device, got {name} {why}; load them first{hint}"
            )
        if kind := _unusual(original):
            raise ValueError(
                f"expected an ordinary tensor at {name}, got {kind}; replace it with a copy: "
                f"nn.Parameter(weight.detach().to_dense().resolve_neg().clone()), outside of inference mode{hint}"
            )
    if not isinstance(parameter, Tensor) or not isinstance(parameter, nn.Parameter):
        if place.parametrizations is not None:
            return
        found = type(getattr(place.module, place.tensor, None)).__name__
        raise ValueError(
            f"expected {name} to be an nn.Parameter, got {found}; "
            "old-style weight_norm, spectral_norm and prune hooks replace the parameter; use "
            f"torch.nn.utils.parametrizations instead, or remove them first{hint}"
        )
    if is_sharded(parameter):
        raise ValueError(f"expected a model that is not yet wrapped, got {name} sharded over processes; {_ORDER}")
    if isinstance(place.module, nn.Embedding | nn.EmbeddingBag):
        for option in ("sparse", "max_norm"):
            if getattr(place.module, option):
                raise ValueError(
                    f"expected an embedding without {option}=, got {option}={getattr(place.module, option)} at "
                    f"{name}: it writes to the weight past the parametrization, or needs sparse gradients{hint}"
                )
    if parameter.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise ValueError(
            f"expected a weight of a real floating dtype at {name}, got {parameter.dtype}; "
            f"sparsify before quantising{hint}"
        )


def _unusual(parameter: Tensor) -> str:
    """Return why a parametrization could not read or write the memory of a Parameter, or "" if it can."""
    if parameter.layout != torch.strided:
        return f"a tensor of layout {parameter.layout}"
    if parameter.is_inference():
        return "one that was made in torch.inference_mode()"
    return "a view with the negative bit" if parameter.is_neg() else ""


def _group_tied(
    chosen: list[Place], users: dict[int, list[Place]], strict: bool
) -> tuple[list[Weight], dict[str, str]]:
    """Group the chosen places by the tensor that they share.

    A tensor that is used in another place as well stays dense, or is refused if `strict`.

    Returns:
        The weights, and the reasons of the places that stay dense, by name.
    """
    groups: dict[int, list[Place]] = {}
    for place in chosen:
        groups.setdefault(place.key, []).append(place)
    weights: list[Weight] = []
    dense: dict[str, str] = {}
    for key, places in groups.items():
        selected = set(map(id, places))
        others = [user.name for user in users[key] if id(user) not in selected]
        if not others:
            weights.append(Weight(tuple(places)))
            continue
        tied = listed(others)
        if strict:
            both = [user.name for user in users[key]]
            raise ValueError(
                f"expected include to name all the places of a tied weight, got {printable(places[0].name)} without "
                f"{tied}; include both, as include={printable(both, LONGEST_MESSAGE)} does (add your other globs), "
                "or neither"
            )
        for place in places:
            dense[place.name] = f"tied to {tied}, which is not selected"
    return weights, dense

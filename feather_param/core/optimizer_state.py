"""The order of the parameters in an optimizer's saved state.

torch saves the state of an optimizer by position, and `sparsify` changes the order of ``model.parameters()``: a layer's
weight moves behind its bias. The state of an optimizer that was built before `sparsify` would be loaded into the wrong
parameters of one that was built after it, and the reverse.

So a followed optimizer adds to its saved state the names that its parameters have in the plain model. It sorts a state
that it loads by these names. They are an entry of their own, not part of the parameter groups: an optimizer without a
controller would load names in the groups and save them again, when they may be wrong. Names that torch saved, in
"param_names" or as keys (torch.distributed.checkpoint), are used as well. A state without names is refused.
"""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from feather_param.selection.names import plain_name

_KEY = "feather_param"  # of the names in a saved state

Names = list[list[str | None]]
"""The name of each parameter of each group; None for a parameter of another model."""


class ParameterOrder:
    """Writes names into the saved states of a model's optimizer, and sorts states by name. Its methods are hooks."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def write(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Add the names of the parameters to a state that is being saved."""
        state_dict.setdefault(_KEY, []).append(self._names(optimizer))  # a list: several controllers may follow

    def restore(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Sort a state that is being loaded into the order of this optimizer.

        Raises:
            ValueError: it has no names, or those of other groups, or it cannot be sorted (LBFGS).
        """
        groups = state_dict["param_groups"]
        ids = [list(group["params"]) for group in groups]
        own = self._names(optimizer)
        if [len(group) for group in ids] != [len(group) for group in own]:
            return  # torch refuses it
        if not any(map(any, own)):
            return  # the optimizer holds no parameter of this model
        if not any(isinstance(value, Tensor) for each in state_dict["state"].values() for value in each.values()):
            return  # it holds nothing that could be loaded into the wrong parameter
        sources = [*state_dict.get(_KEY, ()), [group.get("param_names", ()) for group in groups], ids]
        positions = next((found for names in sources if (found := _positions(own, names)) is not None), None)
        if positions is None:
            raise ValueError(
                "expected an optimizer state with the names of its parameters, got one without names, saved by an "
                "optimizer that no controller followed; sparsify changes the order of model.parameters(), so the state "
                "fits only an optimizer built on the same side of sparsify (before or after) as the one that saved "
                "it; if this one was, load the state before sparsify(optimizer=...) or follow()"
            )
        if all(group == sorted(group) for group in positions):
            return
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "expected an LBFGS state in this optimizer's order of parameters, got another order: it holds all "
                "parameters in one row, so it cannot be sorted; build the optimizer on the same side of sparsify "
                "(before or after) as in the run that saved it"
            )
        state_dict["param_groups"] = [
            {
                key: [value[i] for i in order] if key in ("params", "param_names") else value
                for key, value in group.items()
            }
            for group, order in zip(groups, positions, strict=True)
        ]

    def _names(self, optimizer: Optimizer) -> Names:
        names: dict[int, str] = {}  # of a tied parameter the first in the alphabet: `sparsify` changes their order
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            plain = plain_name(name)
            names[id(parameter)] = min(plain, names.get(id(parameter), plain))
        return [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]


def _positions(own: Names, theirs: Any) -> list[list[int]] | None:
    """Return the position of each of our names in their groups, or None if the names are not the same.

    All their names may begin with a common prefix. A parameter without a name keeps its position.

    Raises:
        ValueError: the names are the same, but in other groups.
    """
    found: list[list[Any]] = [
        [plain_name(name) if isinstance(name, str) and mine else None for name, mine in zip(names, group, strict=False)]
        for names, group in zip(theirs, own, strict=False)
    ]
    wanted, given = (sorted(filter(None, itertools.chain(*names))) for names in (own, found))
    prefix = given[0].removesuffix(wanted[0]) if given else ""
    if given != [prefix + name for name in wanted]:
        return None
    positions: list[list[int]] = []
    for group, names in zip(own, found, strict=True):
        indices = {name: i for i, name in enumerate(names)}
        if any(name is not None and prefix + name not in indices for name in group):
            raise ValueError(
                "expected an optimizer state with the parameter groups of this optimizer, got the same parameters in "
                "other groups; build the groups as in the run that saved it"
            )
        positions.append([i if name is None else indices[prefix + name] for i, name in enumerate(group)])
    return positions

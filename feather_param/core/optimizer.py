"""What the library asks of the optimizer it follows, and how its saved state finds the right parameters."""

from __future__ import annotations

import itertools
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from feather_param.core import copies
from feather_param.ops.tracing import eager
from feather_param.parametrizations import SharedSparsity
from feather_param.selection.names import plain_name
from feather_param.utils.warn import warn

_KEY = "feather_param"  # of what we add to a saved state, beside torch's "state" and "param_groups"

_WRAPPER = Optimizer.__init__.__code__.co_filename, "wrapper"  # where torch calls the hooks of `step`
_INITIALISER = os.path.join("distributed", "checkpoint", "state_dict.py")


def checked_optimizer(optimizer: Any, weights: Mapping[str, Sequence[Tensor]]) -> Optimizer:
    """Return the optimizer that makes the steps: the one inside, of one that wraps it (accelerate's, Lookahead).

    Raises:
        TypeError: it is no optimizer, or a wrapper that does not show which one it wraps.
        ValueError: it holds none of the Parameters behind the weights.
    """
    outer = type(optimizer).__name__
    # torch calls the hooks of an optimizer from `step`, which the constructor of `Optimizer` sees to.
    while not (hasattr(optimizer, "_optimizer_step_post_hooks") and getattr(type(optimizer).step, "hooked", False)):
        held = vars(optimizer).values() if hasattr(optimizer, "__dict__") and hasattr(optimizer, "step") else ()
        inside = [each for each in held if isinstance(each, Optimizer)]
        if not inside and not isinstance(optimizer, Optimizer):
            raise TypeError(f"expected optimizer to be a torch.optim.Optimizer, got {outer}")
        if len(inside) != 1:
            raise TypeError(
                f"expected an optimizer whose step() calls hooks, got {outer}, which does not call the constructor of "
                "torch.optim.Optimizer; pass the optimizer that it wraps, or call controller.step() yourself"
            )
        (optimizer,) = inside
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    strangers = [name for name, originals in weights.items() if not any(id(each) in trained for each in originals)]
    if len(strangers) == len(weights):
        raise ValueError(
            "expected an optimizer of this model's weights, got one that holds none of them: "
            "build it from model.parameters(), after fully_shard where there is one"
        )
    if strangers:
        warn(
            f"this optimizer does not train {', '.join(strangers)}, which will be pruned nevertheless; "
            "leave them dense with exclude, unless another optimizer trains them"
        )
    return optimizer


class Follower:
    """Calls something after every step of an optimizer of a sparsified model, and keeps its saved states in order.

    The ``step`` of a subclass may call that of its base class, and torch may call the hooks in both (it patches a class
    when its first instance is made): what counts is the outermost call. `active` tells whether the model is still
    sparsified: a hook cannot remove itself while torch goes through them, so the next follower of an optimizer removes
    those of one that is not.
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, after_step: Callable[[], None], active: Callable[[], bool]
    ) -> None:
        for hook in list(optimizer._optimizer_step_post_hooks.values()):
            other = getattr(hook, "__self__", None)
            if isinstance(other, Follower) and not other._active():
                other.detach()
        self._after_step, self._active = after_step, active
        order = _Order(model)
        self._handles = (
            optimizer.register_step_post_hook(self._note),
            optimizer.register_state_dict_post_hook(order.write),
            optimizer.register_load_state_dict_pre_hook(order.restore),
        )

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    @eager
    def _note(self, optimizer: Optimizer, *_: Any) -> None:
        stack = [frame for frame, _ in traceback.walk_stack(sys._getframe())]
        # torch.distributed.checkpoint makes the state of an optimizer by a step that trains nothing.
        initialises = any(frame.f_code.co_filename.endswith(_INITIALISER) for frame in stack)
        if not initialises and sum(_is_step(frame, optimizer) for frame in stack) <= 1:
            self._after_step()


def _is_step(frame: FrameType, optimizer: Optimizer) -> bool:
    """Return whether a frame is that of the function in which torch wraps `step`, called of an optimizer."""
    if (frame.f_code.co_filename, frame.f_code.co_name) != _WRAPPER:
        return False  # and leave its locals alone: to read them keeps what they hold alive
    args = frame.f_locals.get("args")
    return bool(args) and args[0] is optimizer


class Movement:
    """Whether training moves the weights at all: looked at once, after some steps."""

    _STEPS = 10

    def __init__(self) -> None:
        self._steps = 0
        self._bits: list[copies.Bits] = []

    def look(self, shared: SharedSparsity) -> None:
        """Warn at a step if no weight that takes gradients has moved in the ten before."""
        if self._steps > self._STEPS or shared.sharded:
            return
        self._steps += 1
        if self._steps in (1, self._STEPS + 1):
            trained = [place.originals for place in shared.places.values() if place.originals[0].requires_grad]
            before, self._bits = self._bits, [copies.bits(originals) for originals in trained]
            if before and len(before) == len(trained) and not any(map(copies.Bits.differ, before, self._bits)):
                warn(
                    f"none of the {len(trained)} prunable weights has moved in {self._STEPS} steps: the optimizer does "
                    "not hold them; while sparsified, layer.weight is no Parameter, so build parameter groups from "
                    "model.named_parameters(), or before sparsify"
                )


# Note [The order of an optimizer's state]
# Optimizer state is saved by position, and `sparsify` changes the order of ``model.parameters()``: a layer's weight
# moves behind its bias. A state saved by an optimizer that was built on the other side of `sparsify` would land on the
# wrong parameters. So a followed optimizer writes into its state the names that its parameters have in the plain
# model, and sorts by name a state that it loads. The names stand beside the parameter groups, not in them: torch
# would carry them along from there in an optimizer that nobody follows, where they may be wrong after the next load.
# Names that torch itself has saved, in "param_names" or in the place of numbers (torch.distributed.checkpoint),
# serve as well. A state without any is refused.


class _Order:
    """Writes and sorts the states of an optimizer of a model; see Note [The order of an optimizer's state]."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def write(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Add the names of the parameters to a state."""
        state_dict.setdefault(_KEY, []).append(self._names(optimizer))  # a list: several controllers may follow

    def restore(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Bring a state into the order of this optimizer, or refuse it."""
        groups = state_dict["param_groups"]
        ids = [list(group["params"]) for group in groups]
        own = self._names(optimizer)
        if [len(group) for group in ids] != [len(group) for group in own] or not any(map(any, own)):
            return  # torch refuses the first; the second holds nothing of this model
        if not any(isinstance(value, Tensor) for each in state_dict["state"].values() for value in each.values()):
            return  # nothing that could land on the wrong parameter
        sources = [*state_dict.get(_KEY, ()), [group.get("param_names", ()) for group in groups], ids]
        positions = next((found for names in sources if (found := _find(own, names)) is not None), None)
        if positions is None:
            raise ValueError(
                "expected an optimizer state that tells which parameters it belongs to, got one without names, saved "
                "by an optimizer that no controller followed; sparsify changes the order of model.parameters(), so it "
                "matters whether that one was built before or after; if it was built on the same side as this one, "
                "load its state before the controller follows this one (before sparsify(optimizer=...) or follow())"
            )
        if all(group == sorted(group) for group in positions):
            return
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "expected an LBFGS state in this optimizer's order of parameters, got another order: it holds all "
                "parameters in one row, so it cannot be sorted; build the optimizer on the same side of sparsify "
                "(before or after) as in the run that saved it"
            )
        state_dict["param_groups"] = [
            {
                key: [value[at] for at in order] if key in ("params", "param_names") else value
                for key, value in group.items()
            }
            for group, order in zip(groups, positions, strict=True)
        ]

    def _names(self, optimizer: Optimizer) -> list[list[str | None]]:
        """Return the name of each parameter of each group; None for one that is not the model's."""
        names: dict[int, str] = {}  # of a tied parameter the smallest, for `sparsify` changes which one is the first
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            plain = plain_name(name)
            names[id(parameter)] = min(plain, names.get(id(parameter), plain))
        return [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]


def _find(own: list[list[str | None]], theirs: Any) -> list[list[int]] | None:
    """Return where in `theirs` each name of `own` stands, group by group, or None if they are not the same names.

    What has no name in `own` stays where it is. All the names in `theirs` may have one more prefix.
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
        places = {name: at for at, name in enumerate(names)}
        if any(name is not None and prefix + name not in places for name in group):
            raise ValueError(
                "expected an optimizer state with the parameter groups of this optimizer, got the same parameters in "
                "other groups; build the groups as in the run that saved it"
            )
        positions.append([at if name is None else places[prefix + name] for at, name in enumerate(group)])
    return positions

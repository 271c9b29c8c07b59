"""The optimizer that a controller follows."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from feather_param.core.optimizer_state import ParameterOrder
from feather_param.ops.tracing import eager
from feather_param.utils.text import listed
from feather_param.utils.warn import warn

# File and name of the function in which torch wraps `step`, and from which it calls the hooks.
_WRAPPER = Optimizer.__init__.__code__.co_filename, "wrapper"
# Tables of the hooks that a follower registers. The constructor of `Optimizer` makes all of them, and timm's Lookahead
# only those of `step`.
_TABLES = "_optimizer_step_post_hooks", "_optimizer_state_dict_post_hooks", "_optimizer_load_state_dict_pre_hooks"
# File from which torch.distributed.checkpoint creates an optimizer's state, by a step that trains nothing.
_INITIALISER = os.path.join("distributed", "checkpoint", "state_dict.py")


def checked_optimizer(optimizer: Any, weights: Mapping[str, Sequence[Tensor]]) -> Optimizer:
    """Return the optimizer that makes the steps. Of a wrapper (accelerate's, Lookahead), this is the one inside.

    Warns of weights that it does not hold.

    Args:
        optimizer: an optimizer or a wrapper.
        weights: the Parameters of each weight, by name.

    Raises:
        TypeError: it is no optimizer, or a wrapper in which no optimizer is found.
        ValueError: it holds no Parameter of the weights.
    """
    outer = type(optimizer).__name__
    while not _calls_hooks(optimizer):
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
    untrained = [name for name, originals in weights.items() if not any(id(each) in trained for each in originals)]
    if len(untrained) == len(weights):
        raise ValueError(
            "expected an optimizer of this model's weights, got one that holds none of them: "
            "build it from model.parameters(), after fully_shard where there is one"
        )
    if untrained:
        warn(
            f"this optimizer does not train {listed(untrained)}, and they will be pruned; "
            "leave them dense with exclude, unless another optimizer trains them"
        )
    return optimizer


def _calls_hooks(optimizer: Any) -> bool:
    """Return whether torch calls hooks of this optimizer: only if the constructor of `Optimizer` was called.

    The tables alone do not tell it, and neither does the class: ``zero_grad`` prepares its ``step`` as well.
    """
    return all(hasattr(optimizer, table) for table in _TABLES) and getattr(type(optimizer).step, "hooked", False)


class Follower:
    """Calls a function after each step of an optimizer, and keeps the optimizer's saved states in order.

    The ``step`` of a subclass may call that of its base class, and torch may call the hooks in both. Only the outermost
    call counts.

    Args:
        optimizer: the optimizer.
        model: its model.
        after_step: the function.
        active: tells whether the model is still sparsified. A hook cannot be removed while torch calls the hooks, so
            the next follower of an optimizer removes those that are no longer active.
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, after_step: Callable[[], None], active: Callable[[], bool]
    ) -> None:
        for hook in list(optimizer._optimizer_step_post_hooks.values()):
            other = getattr(hook, "__self__", None)
            if isinstance(other, Follower) and not other._active():
                other.detach()
        self._after_step, self._active = after_step, active
        order = ParameterOrder(model)
        self._handles = (
            optimizer.register_step_post_hook(self._step_hook),
            optimizer.register_state_dict_post_hook(order.write),
            optimizer.register_load_state_dict_pre_hook(order.restore),
        )

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    @eager
    def _step_hook(self, optimizer: Optimizer, *_: Any) -> None:
        stack = [frame for frame, _ in traceback.walk_stack(sys._getframe())]
        initialises = any(frame.f_code.co_filename.endswith(_INITIALISER) for frame in stack)
        if not initialises and sum(_is_step(frame, optimizer) for frame in stack) <= 1:
            self._after_step()


def _is_step(frame: FrameType, optimizer: Optimizer) -> bool:
    """Return whether a frame is that of torch's wrapper of `step`, called on an optimizer."""
    if (frame.f_code.co_filename, frame.f_code.co_name) != _WRAPPER:
        return False  # reading its locals would keep the objects in them alive
    args = frame.f_locals.get("args")
    return bool(args) and args[0] is optimizer

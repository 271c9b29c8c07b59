"""What the library asks of the optimizer it follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from feather_param.selection import Selection
from feather_param.warning import warn

__all__ = ["check_optimizer", "follow"]

# Optimizer state of the shape of its parameter, in torch.optim and most others; some state has shapes of its own.
_LIKE_PARAMETER = ("momentum_buffer", "exp_avg", "exp_avg_sq", "square_avg", "sum", "exp_inf")


def check_optimizer(optimizer: torch.optim.Optimizer, selection: Selection) -> None:
    """Refuse an optimizer whose steps would not be steps of this model."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"expected optimizer to be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    strangers = [
        weight.name
        for weight in selection.weights
        if not any(id(parameter) in trained for parameter in weight.sites[0].originals)
    ]
    if len(strangers) == len(selection.weights):
        raise ValueError(
            "expected an optimizer of this model's weights, got one that holds none of them: "
            "build it from model.parameters()"
        )
    if strangers:
        warn(
            f"this optimizer does not train {', '.join(strangers)}, which will be pruned nevertheless; "
            "leave them dense with exclude, unless another optimizer trains them"
        )


def follow(optimizer: torch.optim.Optimizer, after_step: Callable[[], None]) -> None:
    """Call something after every step of an optimizer, and watch over the states it loads."""
    optimizer.register_load_state_dict_pre_hook(_check_shapes)
    optimizer.register_step_post_hook(lambda *_: after_step())


def _check_shapes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Refuse a state whose order of parameters is another.

    Optimizer state is stored by position, and `sparsify` changes the order of ``model.parameters()`` within a layer
    (a bias comes first). A state saved by an optimizer built on the other side of `sparsify` would land on
    the wrong parameters; it shows in the shapes.
    """
    states = state_dict["state"]
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        for parameter, index in zip(group["params"], saved["params"], strict=False):
            for name in _LIKE_PARAMETER:
                value = states.get(index, {}).get(name)
                if isinstance(value, Tensor) and value.shape != parameter.shape:
                    raise ValueError(
                        f"expected an optimizer state in this optimizer's order of parameters, got {name} of shape "
                        f"{tuple(value.shape)} for parameter {index} of shape {tuple(parameter.shape)}: it was saved "
                        "on the other side of sparsify; build the optimizer on the same side as in the run that "
                        "saved it (before or after sparsify), then load"
                    )

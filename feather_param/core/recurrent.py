"""LSTM, GRU and RNN keep a list of their weights; of a parametrized one it must not outlive the call that made it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["methods", "plain_again"]


def methods(layer: nn.Module, own_class: Callable[[nn.Module], type]) -> dict[str, Callable[..., Any]]:
    """Return methods with which a parametrized layer keeps no list; none for layers of other kinds.

    Thresholded weights in the list would hold on to the graph of a pass, and cannot be deepcopied.

    Args:
        layer: the layer.
        own_class: returns the class that a layer has these methods from.
    """
    if not isinstance(layer, nn.RNNBase):
        return {}

    def forgetful(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return getattr(super(own_class(self), self), name)(*args, **kwargs)  # type: ignore[misc]
            finally:
                self._flat_weights = [None] * len(self._flat_weights_names)

        return method

    return {name: forgetful(name) for name in ("forward", "_apply")}


def plain_again(layer: nn.Module) -> None:
    """Fill the list of a layer that is plain again: it holds the Parameters."""
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()

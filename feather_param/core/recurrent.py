"""LSTM, GRU and RNN layers, which keep a list of their weights.

A parametrized layer must not keep pruned weights in this list: they hold the graph of a forward pass, and deepcopy
refuses them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def methods(layer: nn.Module) -> dict[str, Callable[..., Any]]:
    """Return methods for the class of a parametrized layer that empty the list after use; none for other layers."""
    if not isinstance(layer, nn.RNNBase):
        return {}

    def emptying(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            finally:
                self._flat_weights = [None] * len(self._flat_weights_names)

        return call

    plain: Any = type(layer).__bases__[0]
    return {"forward": emptying(plain.forward), "_apply": emptying(plain._apply)}


def refill(layer: nn.Module) -> None:
    """Fill the list with the Parameters of a layer that is plain again."""
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()

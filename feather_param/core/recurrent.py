"""LSTM, GRU and RNN keep a list of their weights; of a parametrized one it must not outlive the call that made it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def methods(layer: nn.Module) -> dict[str, Callable[..., Any]]:
    """Return methods for the class of a parametrized layer, with which it keeps no list; none for other layers.

    Thresholded weights in the list would hold on to the graph of a pass, and cannot be deepcopied.
    """
    if not isinstance(layer, nn.RNNBase):
        return {}

    def forgetful(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            finally:
                self._flat_weights = [None] * len(self._flat_weights_names)

        return call

    plain: Any = type(layer).__bases__[0]
    return {"forward": forgetful(plain.forward), "_apply": forgetful(plain._apply)}


def plain_again(layer: nn.Module) -> None:
    """Fill the list of a layer that is plain again: it holds the Parameters."""
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()

"""LSTM, GRU and RNN keep a list of the weights of their last pass; it must not outlive the pass."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["drop_weights_after_forward", "keep_weights_after_forward"]


def drop_weights_after_forward(module: nn.Module) -> None:
    """Empty the list after each pass: thresholded weights would hold on to the graph, and cannot be deepcopied."""
    if isinstance(module, nn.RNNBase) and _drop not in module._forward_hooks.values():
        module.register_forward_hook(_drop, always_call=True)  # also after a pass that failed


def keep_weights_after_forward(module: nn.Module) -> None:
    """Undo `drop_weights_after_forward`."""
    if isinstance(module, nn.RNNBase):
        for key in [key for key, hook in module._forward_hooks.items() if hook is _drop]:
            del module._forward_hooks[key]
        if not nn.utils.parametrize.is_parametrized(module):
            module._init_flat_weights()  # the list of a plain layer holds its Parameters


def _drop(module: Any, *_: Any) -> None:
    module._flat_weights = [None] * len(module._flat_weights_names)

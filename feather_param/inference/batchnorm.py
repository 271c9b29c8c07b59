"""Recompute the running statistics of BatchNorm layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from feather_param.utils.text import printable


def recalibrate_batchnorm(model: nn.Module, loader: Iterable[Any]) -> None:
    """Recompute the running statistics of every BatchNorm layer as the mean over the batches of a loader.

    Pruning in one step changes the input of every layer, so the running statistics no longer fit: call this
    afterwards. After a training that ended near its final rate it changes almost nothing. The mean and the (unbiased)
    variance of each layer become the averages over all batches, with the weights of the model as it is now.

    Unlike `torch.optim.swa_utils.update_bn`, it runs the model without dropout, and restores the mode and momentum of
    each module. If it raises, it restores the old statistics too. Layers that the model does not call keep theirs.

    Use training data in batches of the size used in training. All batches count equally, so drop a smaller last batch.
    Sparsified and plain models both work. With DDP, pass the module inside. Each process then averages over its own
    batches (with SyncBatchNorm, over those of all processes).

    An error leaves the model unchanged.

    Args:
        model: any model with BatchNorm layers that keep running statistics, SyncBatchNorm included.
        loader: batches: tensors, or tuples or lists whose first element is the input tensor of the model. The
            inputs are moved to the device of the model.

    Raises:
        ValueError: the model has no such layer, the loader has no batch, or a statistic is NaN or infinite.
        TypeError: the model is no nn.Module, the loader is a tensor or no iterable, or a batch is of another kind.

    Example:
        >>> model = nn.BatchNorm1d(1)
        >>> recalibrate_batchnorm(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [9.0]])])
        >>> model.running_mean.item(), model.running_var.item()
        (4.5, 5.0)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be an nn.Module, got {type(model).__name__}")
    if isinstance(loader, Tensor) or (not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__")):
        hint = "; wrap it in a list: [x]" if isinstance(loader, Tensor) else ""
        raise TypeError(f"expected a loader of batches, an iterable, got {type(loader).__name__}{hint}")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None
    }
    if not layers:
        raise ValueError(
            f"expected a model with BatchNorm layers that keep running statistics, got {type(model).__name__} without; "
            "there is nothing to recalibrate"
        )
    modes = {module: module.training for module in model.modules()}
    momenta = {layer: layer.momentum for layer in layers.values()}
    before = {layer: [buffer.clone() for buffer in layer.buffers(recurse=False)] for layer in layers.values()}
    try:
        # Set the attribute, because a model may override train() and eval().
        for module in modes:
            module.training = False
        for layer in layers.values():
            layer.training, layer.momentum = True, None  # None: a cumulative average since the reset
            layer.reset_running_stats()
        _run(model, loader)
        for name, layer in layers.items():
            if not layer.num_batches_tracked:
                _restore(layer, before[layer])
            elif not all(bool(buffer.isfinite().all()) for buffer in layer.buffers(recurse=False)):
                raise ValueError(
                    f"expected finite statistics, got NaN or infinity in {printable(name or 'the model')}; "
                    "check the inputs and the weights for NaN"
                )
    except BaseException:
        for layer, buffers in before.items():
            _restore(layer, buffers)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
        for layer, momentum in momenta.items():
            layer.momentum = momentum


@torch.no_grad()
def _run(model: nn.Module, loader: Iterable[Any]) -> None:
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    empty = True
    for batch in loader:
        empty = False
        x = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(x, Tensor):
            raise TypeError(
                f"expected batches that are tensors, or tuples or lists that begin with one, got {type(batch).__name__}"
                "; pick the model's input yourself, as in (batch['image'] for batch in loader)"
            )
        model(x.to(device))
    if empty:
        raise ValueError("expected a loader with at least one batch, got none; an iterator gives its batches only once")


@torch.no_grad()
def _restore(layer: nn.Module, buffers: Iterable[Tensor]) -> None:
    for buffer, old in zip(layer.buffers(recurse=False), buffers, strict=True):
        buffer.copy_(old)

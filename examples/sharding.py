"""FSDP2 for a network of any kind: divide its weights over the processes, and gather and load whole states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from examples.processes import Processes


def shard(model: nn.Module, device: torch.device, processes: Processes) -> None:
    """Divide the weights of a model over the processes, after `sparsify` and before the optimizer is built.

    The weights of a block are gathered together: a block is a child of an outermost ``nn.Sequential``.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.count,))
    for block in _blocks(model):
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from child.children() if isinstance(child, nn.Sequential) else _blocks(child)


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, gathered from all processes if it is divided over them."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined]


def state_dict(model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> dict[str, Any]:
    """Return the whole states of a sharded model, its optimizer and its moving average.

    They are in the first process, and empty ones elsewhere. Call this in all processes.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    states: dict[str, Any] = {} if ema is None else {"ema": get_model_state_dict(ema, options=options)}
    states["model"], states["optimizer"] = get_state_dict(model, optimizer, options=options)
    return states


def load_state_dict(
    state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None
) -> None:
    """Load what `state_dict` has returned in the first process. Call this in all processes, with the same state."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    if ema is not None:
        set_model_state_dict(ema, state["ema"], options=options)

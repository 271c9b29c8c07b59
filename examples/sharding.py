"""FSDP2 for a network of any kind: divide its weights over the processes, and gather and load whole states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

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


def whole(state: dict[str, Any]) -> dict[str, Any]:
    """Make the tensors of a state whole and move them to the CPU, in place, and return the state.

    Call this in all processes, which gather what is divided over them. In place, because ``_metadata`` of a
    ``state_dict`` holds the versions of the modules, which some networks check.
    """
    for name, value in state.items():
        state[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu()
    return state


def load(model: nn.Module, state: dict[str, Any]) -> None:
    """Load a whole state into a sharded model. Call this in all processes, with the same state."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    own = model.state_dict()
    for name, value in own.items():
        if isinstance(value, DTensor):
            own[name] = distribute_tensor(state[name].to(value.device), value.device_mesh, value.placements)
        else:
            own[name] = state[name]
    model.load_state_dict(own)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the whole state of an optimizer: in the first process, and an empty one elsewhere."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_optimizer_state_dict(model, optimizer, options=options))


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a whole state into an optimizer. Call this in all processes, with the same state."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))

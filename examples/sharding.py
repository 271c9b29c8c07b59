"""FSDP2 for a network of any kind: divide its weights over the processes, and gather and load whole states.

Without FSDP2 (``sharded=False``), states are those of the module and the optimizer themselves.
"""

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


def state_dict(model: nn.Module, sharded: bool) -> dict[str, Any]:
    """Return the whole state of a model: if it is sharded, in the first process, and an empty one elsewhere."""
    if not sharded:
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, sharded: bool) -> dict[str, Any]:
    """Return the whole state of an optimizer: if it is sharded, in the first process, and an empty one elsewhere."""
    if not sharded:
        return optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, optimizer, options=options)


def load(model: nn.Module, state: dict[str, Any], sharded: bool) -> None:
    """Load a whole state, which all processes have, into a model."""
    if not sharded:
        model.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], sharded: bool) -> None:
    """Load a whole state, which all processes have, into an optimizer."""
    if not sharded:
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))

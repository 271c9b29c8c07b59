"""The network that several processes train, its batches, and comparisons between the processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import feather_param

STEPS = 6


def net(seed: int = 0) -> nn.Sequential:
    """Return a network with sizes that 2 and 3 do not divide, and a last layer with fewer than three rows."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(13, 35), nn.ReLU(), nn.Linear(35, 17), nn.ReLU(), nn.Linear(17, 2, bias=False))


ZEROS = round(0.9 * (13 * 35 + 35 * 17 + 17 * 2))


def batch(step: int, rank: int = 0, world: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the samples of a rank in a step."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(12, 13, generator=generator), torch.randint(2, (12,), generator=generator)
    return x.chunk(world)[rank], y.chunk(world)[rank]


def train(model, optimizer, controller, rank, world, steps=range(STEPS)) -> None:
    for step in steps:
        x, y = batch(step, rank, world)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        controller.step()


def sparsify(model: nn.Module, **arguments) -> feather_param.Controller:
    return feather_param.sparsify(model, **{"final_rate": 0.9, "total_steps": STEPS, "end_step": 4, **arguments})


def same_everywhere(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is equal in all processes."""
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return all(torch.equal(gathered[0], other) for other in gathered)


def weights_of(state: dict[str, torch.Tensor], prefix: str = "") -> list[torch.Tensor]:
    """Return the prunable weights in a baked state_dict."""
    return [state[f"{prefix}{i}.weight"] for i in (0, 2, 4)]

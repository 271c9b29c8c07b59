"""Several processes, each with its part of every batch, as `torchrun` starts them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["ALONE", "Processes", "joined"]


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def part(self, batch: Tensor) -> Tensor:
        """Return this process's part of a batch; the parts differ by one image at most."""
        return batch.tensor_split(self.count)[self.rank]

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model with its gradients averaged over the processes."""
        return model if self.count == 1 else DistributedDataParallel(model)

    def any(self, here: bool) -> bool:
        """Return whether it is so in any process."""
        if self.count == 1:
            return here
        flag = torch.tensor(float(here))
        dist.all_reduce(flag)
        return bool(flag)

    def same(self, tensor: Tensor) -> bool:
        """Return whether all the processes have the same values."""
        if self.count == 1:
            return True
        theirs = tensor.clone()
        dist.broadcast(theirs, src=0)
        return not self.any(not torch.equal(theirs, tensor))


ALONE = Processes()


@contextmanager
def joined(cuda: bool) -> Iterator[Processes]:
    """Join the other processes if `torchrun` started this one, and leave them in the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
    finally:
        # A wrapped model lies in reference cycles and holds on to the group, whose threads would then still let go of
        # tensors while the interpreter ends, and abort it.
        gc.collect()
        dist.destroy_process_group()

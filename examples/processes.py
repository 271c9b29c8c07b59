"""Several processes that train on parts of every batch, as `torchrun` starts them."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from examples.resumable import UserError


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as `torchrun` starts them, seen from one of them."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    def part(self, batch: Tensor) -> Tensor:
        """Return the part of a batch for this process. The sizes of the parts differ by at most one image."""
        return batch.tensor_split(self.count)[self.rank]

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return a module that averages the gradients of the model over the processes."""
        return model if self.count == 1 else DistributedDataParallel(model)

    def any(self, here: bool) -> bool:
        """Return whether the condition holds in any process."""
        if self.count == 1:
            return here
        flag = torch.tensor(float(here))
        dist.all_reduce(flag)
        return bool(flag)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of the tensors of all processes, on the CPU."""
        total = tensor.detach().cpu().clone()
        if self.count > 1:
            dist.all_reduce(total)
        return total

    def copy_statistics(self, model: nn.Module) -> None:
        """Copy the batch norm statistics of the first process to all. They are of its own images."""
        if self.count == 1:
            return
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for buffer in module.buffers():
                    dist.broadcast(buffer, src=0)

    def same(self, tensor: Tensor) -> bool:
        """Return whether all processes have equal tensors."""
        if self.count == 1:
            return True
        first = tensor.clone()
        dist.broadcast(first, src=0)
        return not self.any(not torch.equal(first, tensor))


ALONE = Processes()


@contextmanager
def joined(cuda: bool) -> Iterator[Processes]:
    """Join the other processes if `torchrun` started this one, and leave them at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
    finally:
        # A wrapped model is part of reference cycles and keeps the group alive. The threads of the group would then
        # still free tensors while the interpreter shuts down, which aborts it.
        gc.collect()
        dist.destroy_process_group()


def choose_device(no_cuda: bool, gpu: int, processes: Processes) -> torch.device:
    """Return the device to train on. The processes of a machine use the GPUs from this one on, one each.

    Raises:
        UserError: there is no such GPU. All processes of a machine raise it.
    """
    if no_cuda or not torch.cuda.is_available():
        if not no_cuda and processes.first:
            print("there is no CUDA on this machine: training on the CPU", file=sys.stderr)
        return torch.device("cpu")
    count, local_count = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if gpu >= count:
        raise UserError(f"expected --gpu to be below {count}, the number of GPUs, got {gpu}")
    if gpu + local_count > count:
        raise UserError(
            f"expected a GPU for each of {local_count} processes on this machine, got {count - gpu}: lower "
            "--nproc-per-node"
        )
    gpu += processes.local_rank
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)

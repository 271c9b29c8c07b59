"""Detect whether tensors were written to or replaced."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from feather_param.ops.distributed import shard
from feather_param.ops.dtypes import flat


class Version(NamedTuple):
    """The identity of some tensors, and the number of writes to them that torch has counted."""

    tensors: tuple[weakref.ref[Tensor], ...]  # weak references: the `id` of a deleted tensor may be used again
    writes: int

    def replaced(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether some tensors are not the ones of this version."""
        for known, tensor in zip(self.tensors, tensors, strict=False):  # a loop: this runs in each forward pass
            if known() is not tensor:
                return True
        return len(self.tensors) != len(tensors)

    def invalidated(self) -> Version:
        """Return a version of the same tensors that differs from any number of writes."""
        return self._replace(writes=-1)


def version_of(tensors: Sequence[Tensor]) -> Version:
    """Return the version of some tensors."""
    return Version(tuple(map(weakref.ref, tensors)), writes_to(tensors))


def writes_to(tensors: Sequence[Tensor]) -> int:
    """Return the number of writes to some tensors. Torch does not count writes to inference tensors."""
    total = 0
    for tensor in tensors:
        total += 0 if tensor.is_inference() else tensor._version
    return total


class Checksum(NamedTuple):
    """The sum of the memory of some tensors, read as integers.

    It finds writes that torch does not count, such as those to ``.data``. The result does not depend on the order of
    the additions, so it is the same on any device.
    """

    dtype: torch.dtype
    total: Tensor | None  # None: the tensors have no values

    def differs(self, other: Checksum) -> bool:
        """Return whether the values certainly differ. Sums of different dtypes are not compared: False."""
        if self.total is None or other.total is None or self.dtype != other.dtype:
            return False
        return bool(self.total != other.total.to(self.total.device))


@torch.no_grad()
def checksum_of(tensors: Sequence[Tensor]) -> Checksum:
    """Return the checksum of some tensors; of a sharded tensor, the checksum of this process's shard."""
    totals: list[Tensor] = []
    for tensor in tensors:
        part = shard(tensor.detach())
        if part.is_meta or isinstance(part, FakeTensor):
            return Checksum(part.dtype, None)
        raw = flat(part).contiguous().view(torch.uint8)
        raw = raw.clone() if raw.storage_offset() % 8 else raw
        even = raw.numel() // 8 * 8  # adding eight bytes at a time takes a third of the time of four bytes at a time
        totals += [raw[:even].view(torch.int64).sum(), raw[even:].sum()]
    return Checksum(tensors[0].dtype, torch.stack(totals).sum())

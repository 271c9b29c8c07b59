"""Machine code for sparse convolutions and products on a CPU.

Note [A convolution is a sum of shifted rows]

Store the padded input in flat memory, one channel after the other (the grid, see `layout.py`). If the window moves by
one pixel, the index of each element that it reads moves by one. 16 outputs of a channel that lie side by side are
therefore a sum of vectors, ``weight * grid[position + offset : position + offset + 16]``. The position depends only on
the outputs, and the offset only on the weight: its input channel and its place in the window. Weights that are zero are
left out of the sum. No window is copied (im2col) and nothing is gathered. Park et al. describe the method in
https://arxiv.org/abs/1608.01409.

The sums of a tile (four vectors) stay in registers while all weights of an output channel are added. The inputs of a
tile stay in the cache while all output channels are computed. If they are too many for the first cache, the weights are
divided into parts, each of some input channels (`matrix.py`). Where blocks of four output channels have the same zeros,
each vector of inputs is loaded once for the four. Else the loads limit the speed: one for each vector that is
multiplied.

A Linear layer is such a convolution too: the tokens are transposed, so that 16 of them lie side by side. For a single
token, the inputs are read one by one.

The code is compiled when it is first needed, for a tile's width, activation and residual (the files of this folder). A
job holds the addresses of the code and of all arrays (`job.py`).
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from feather_param.inference.engine.job import Activation
from feather_param.utils.extras import extra

if TYPE_CHECKING:
    from feather_param.inference.engine.machine_code import MachineCode

_OPENMP = ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier", "GOMP_parallel")


def available_threads() -> int:
    """Return how many threads the kernel uses: as many as torch, by its library for OpenMP (libgomp).

    It is one where torch uses another library, and in a forked process, where libgomp would wait for the threads of the
    parent.
    """
    return torch.get_num_threads() if _openmp() and not _process.forked else 1


def worker(
    kind: str, threads: int, activation: Activation = Activation.IDENTITY, rows: int = 1
) -> Callable[[Any], object]:
    """Return a function that runs a job. Its code is compiled when it is first needed.

    Args:
        kind: "convolution", "tokens" or "product".
        threads: that run the job.
        activation: of a product.
        rows: of a block of the matrix, for a product.

    Raises:
        ImportError: llvmlite is not installed.
    """
    code = _process.address(_worker, kind, threads > 1, activation, rows)
    if threads == 1:
        return _RUN(code)
    parallel = _PARALLEL(_openmp()["GOMP_parallel"])

    def run(job: Any) -> None:
        if _process.forked:
            worker(kind, 1, activation, rows)(job)
        else:
            parallel(code, job, threads, 0)

    return run


def tile(rows: int, width: int, activation: Activation, residual: bool) -> int:
    """Return the address of the code of a tile. It is compiled when it is first needed.

    Args:
        rows: output channels in a block; 0 for the largest of the elements in the window.
        width: vectors.
        activation: of the sums.
        residual: whether a tensor is added to the sums.

    Raises:
        ImportError: llvmlite is not installed.
    """
    return _process.address(_tile, rows, width, activation, residual)


_RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PARALLEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


class _Process:
    """The code that this process compiled."""

    def __init__(self) -> None:
        self.forked = False
        self._lock = threading.RLock()
        self._code: dict[Any, tuple[MachineCode, int]] = {}
        if hasattr(os, "register_at_fork"):
            # A fork waits until no thread compiles: in the child, the locks of LLVM would stay locked.
            before, after = self._lock.acquire, self._lock.release
            os.register_at_fork(before=before, after_in_parent=after, after_in_child=self._fork)

    def _fork(self) -> None:
        self.forked = True
        self._lock.release()

    def address(self, compile: Callable[..., tuple[MachineCode, int]], *options: Any) -> int:
        """Return the address of a function, which is compiled at most once."""
        key = compile, *options
        if key not in self._code:
            with self._lock:
                if key not in self._code:
                    self._code[key] = compile(*options)
        return self._code[key][1]


_process = _Process()


def _tile(rows: int, width: int, activation: Activation, residual: bool) -> tuple[MachineCode, int]:
    extra("llvmlite")
    from feather_param.inference.engine.machine_code import MachineCode
    from feather_param.inference.engine.tile import Tile

    code = MachineCode(Tile(rows, width, activation, residual).module(), optimized=True)
    return code, code.address("tile")


def _worker(kind: str, threads: bool, activation: Activation, rows: int) -> tuple[MachineCode, int]:
    extra("llvmlite")
    from llvmlite import binding

    from feather_param.inference.engine.machine_code import MachineCode
    from feather_param.inference.engine.workers import Worker

    for name, address in _openmp().items():
        binding.add_symbol(name, address)
    code = MachineCode(Worker(kind, threads, activation, rows).module())
    return code, code.address("worker")


@functools.cache
def _openmp() -> dict[str, int]:
    """Return the addresses of functions of torch's own library for OpenMP, or nothing if it is not libgomp."""
    try:
        library = ctypes.CDLL(torch._C.__file__)
        return {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in _OPENMP}
    except (AttributeError, OSError):
        return {}

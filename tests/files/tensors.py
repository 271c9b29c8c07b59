"""Tensors and files for the tests of sparse files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from feather_param import save_sparse


def bits(tensor: torch.Tensor) -> bytes:
    """Return the bytes of all elements in row-major order."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().view(same_size).contiguous().reshape(-1).numpy().tobytes()


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors are the same bit by bit."""
    return (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b))


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], density: float, seed: int) -> torch.Tensor:
    """Return a tensor of random bits, with this fraction of elements that are not zero."""
    generator = np.random.default_rng(seed)
    size, n = dtype.itemsize, int(np.prod(shape))
    content = generator.integers(0, 2 if dtype == torch.bool else 256, (n, size), np.uint8)  # NaN payloads too
    content[generator.random(n) >= density] = 0
    return torch.from_numpy(content.reshape(-1)).view(dtype).reshape(shape)


def example(path: Path, zstd: bool) -> bytes:
    """Write a sparse file with tensors of every kind; return its content."""
    torch.manual_seed(0)
    state = {
        "sparse": torch.where(torch.rand(20, 30) < 0.2, torch.randint(1, 9, (20, 30)) / 8, 0.0),
        "dense": torch.randn(8, dtype=torch.complex64),
        "thin": torch.zeros(900, dtype=torch.bfloat16).index_fill(0, torch.tensor([7, 300]), 1.0),
        "n": torch.tensor(3),
        "none": torch.zeros(0, 4),
    }
    save_sparse({**state, "tied": state["sparse"]}, path, zstd=zstd)
    assert (b'\\"zstd\\":true' in path.read_bytes()) == zstd
    return path.read_bytes()

"""Compare the sizes of file formats, by making the content of each. Nothing is written."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from feather_param.files.elements import elements_of
from feather_param.files.sparse import sparse_content
from feather_param.files.tied import untied

_CHUNK = 1 << 20
_LEVEL = 6  # the default of gzip

Progress = Callable[[str, float], None]
"""A function of the name of a format and the fraction of it that is done, in [0, 1]."""


def file_sizes(tensors: Mapping[str, Tensor], progress: Progress = lambda name, fraction: None) -> dict[str, int]:
    """Return the bytes that tensors take: dense, dense and gzipped, and in a sparse file.

    Tied tensors count once. The dense sizes leave out the header, which takes some kilobytes in any format.
    ``"sparse + zstd"`` is only there if zstandard is installed (``pip install feather_param[files]``).
    gzip and zstandard take seconds for 100 MB. ``progress`` is called repeatedly.

    Example:
        >>> weight = torch.where(torch.rand(500, 500) < 0.1, torch.randn(500, 500), 0.0)
        >>> sizes = file_sizes({"weight": weight})
        >>> list(sizes), sizes["dense"], sizes["dense + gzip"] > sizes["sparse"] > sizes["sparse + zstd"]
        (['dense', 'dense + gzip', 'sparse', 'sparse + zstd'], 1000000, True)
    """
    separate = untied(tensors).values()
    dense = sum(tensor.numel() * tensor.element_size() for tensor in separate)
    # One at a time, because the elements of an expanded or transposed tensor are a copy.
    contents = (elements_of(tensor).view(np.uint8) for tensor in separate)
    sizes = {"dense": dense, "dense + gzip": _gzip_size(contents, dense, progress)}
    for name, zstd in (("sparse", False), ("sparse + zstd", True)):
        progress(name, 0.0)
        with suppress(ImportError):  # zstandard is not installed
            sizes[name] = sum(map(len, sparse_content(tensors, zstd)))
    return sizes


def _gzip_size(contents: Iterable[NDArray[np.uint8]], total: int, progress: Progress) -> int:
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, 31)  # 31: with gzip's header and checksum
    size = done = 0
    for content in contents:
        for start in range(0, content.size, _CHUNK):
            chunk = content[start : start + _CHUNK]
            size += len(compressor.compress(chunk.data))
            done += chunk.size
            progress("gzip", done / total)
    return size + len(compressor.flush())

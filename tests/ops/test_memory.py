"""Elements that share memory, compared with sets of addresses."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import torch
from torch import Tensor

from feather_param.ops.memory import require_own_memory, shares_elements


def addresses(tensor: Tensor) -> list[int]:
    """Return the address of each byte of a tensor."""
    width = tensor.element_size()
    indices = itertools.product(*map(range, tensor.shape))
    offsets = [sum(i * stride for i, stride in zip(index, tensor.stride(), strict=True)) for index in indices]
    return [tensor.data_ptr() + width * offset + byte for offset in offsets for byte in range(width)]


def view(generator: random.Random, buffer: Tensor, smallest_stride: int, dims: int) -> Tensor:
    """Return a random view of a buffer."""
    shape = [generator.randint(1, 4) for _ in range(dims)]
    strides = [generator.randint(smallest_stride, 9) for _ in shape]
    return buffer.as_strided(shape, strides, generator.randint(0, 40))


def test_a_tensor_shares_elements_if_two_have_one_address():
    generator = random.Random(0)
    results = set()
    for _ in range(500):
        tensor = view(generator, torch.zeros(200), 0, generator.randint(0, 4))
        found = addresses(tensor)
        assert shares_elements(tensor) == (len(set(found)) < len(found))
        results.add(shares_elements(tensor))
    assert results == {True, False}


def test_weights_share_memory_if_they_have_a_common_address():
    generator = random.Random(1)
    results = set()
    for _ in range(500):
        buffer = torch.zeros(256)
        views = [view(generator, buffer.view(generator.choice([torch.float32, torch.half])), 1, 2) for _ in range(8)]
        tensors = [tensor for tensor in views if not shares_elements(tensor)][:4]
        own = generator.randint(1, len(tensors)) if tensors else 0
        found = [set(addresses(tensor)) for tensor in tensors]
        shared = [(a, b) for a in range(own) for b in range(len(tensors)) if a != b and found[a] & found[b]]
        named = [(str(index), tensor) for index, tensor in enumerate(tensors)]
        results.add(bool(shared))
        if not shared:
            require_own_memory(named[:own], named[own:])
            continue
        with pytest.raises(ValueError, match="which shares memory with") as error:
            require_own_memory(named[:own], named[own:])
        match = re.search(r"got (\d), which shares memory with (\d);", str(error.value))
        assert match is not None
        assert (int(match[1]), int(match[2])) in shared
    assert results == {True, False}


def test_one_tensor_under_two_names_shares_no_memory_with_itself():
    weight = torch.ones(2, 2)
    require_own_memory([("a", weight), ("b", weight)], [("c", weight)])


def test_dense_tensors_may_share_memory_with_each_other():
    buffer = torch.ones(8)
    require_own_memory([("a", torch.ones(2))], [("b", buffer[:6]), ("c", buffer[2:]), ("d", torch.ones(1).expand(3))])

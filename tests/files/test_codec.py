"""Gaps and values: any gap comes back, and the files are small."""

from __future__ import annotations

import pytest
import torch

from feather_param import load_sparse, save_sparse
from tests.files.sparse_files import parts_of, read
from tests.files.tensors import bits, identical, random_tensor


def test_the_example_in_the_documentation(tmp_path):
    save_sparse({"t": torch.cat([torch.zeros(300), torch.ones(1), torch.zeros(600)])}, tmp_path / "t")
    _, data = parts_of((tmp_path / "t").read_bytes())
    assert data == {"gaps:t": bytes([255, 45, 255, 255]), "values:t": bytes([0, 0, 128, 63])}


@pytest.mark.parametrize("n", [0, 1, 253, 254, 255, 256, 509, 510, 511, 765, 65_535, 65_536, 65_537, 200_000])
def test_long_gaps(tmp_path, n):
    for before, after in [(n, 0), (0, n), (n, n)]:
        tensor = torch.cat([torch.zeros(before), torch.tensor([float("nan")]), torch.zeros(after)])
        save_sparse({"t": tensor}, tmp_path / "t")
        assert identical(load_sparse(tmp_path / "t")["t"], tensor)
    save_sparse({"t": torch.zeros(n)}, tmp_path / "t")
    assert identical(load_sparse(tmp_path / "t")["t"], torch.zeros(n))


@pytest.mark.parametrize("density", [1e-5, 1e-3, 0.1, 0.79, 0.81])
def test_tensors_of_many_blocks(tmp_path, density):
    tensor = random_tensor(torch.float32, (700, 1000), density, seed=0)
    save_sparse({"t": tensor}, tmp_path / "t")
    assert identical(load_sparse(tmp_path / "t")["t"], tensor)
    assert read((tmp_path / "t").read_bytes())["t"][2] == bits(tensor)


def test_negative_zero_is_not_zero(tmp_path):
    tensor = torch.zeros(1000)
    tensor[7] = -0.0
    save_sparse({"t": tensor}, tmp_path / "t")
    assert load_sparse(tmp_path / "t")["t"][7].signbit()


@pytest.mark.parametrize(
    ("rate", "plain", "zstd"), [(0.9, 1.33, 1.1), (0.95, 0.69, 0.59), (0.98, 0.31, 0.27), (0.99, 0.18, 0.16)]
)
def test_the_sizes_of_a_tenth_of_resnet50(tmp_path, rate, plain, zstd):
    """A tenth of ResNet-50, with normal weights that all have the same probability to be zero."""
    torch.manual_seed(0)
    n = 2_550_000
    weight = torch.randn(n)
    weight = torch.where(weight.abs() > weight.abs().kthvalue(round(rate * n)).values, weight, 0)
    state = {"weight": weight, "norms and biases": torch.randn(10_724)}
    for limit, compress in ((plain, False), (zstd, True)):
        save_sparse(state, tmp_path / "t", zstd=compress)
        assert (tmp_path / "t").stat().st_size < limit * 1e6

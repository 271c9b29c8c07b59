"""Magnitudes of units: against slow twins, and the same bits in compiled code."""

from __future__ import annotations

import math

import pytest
import torch

from feather_param.ops.dtypes import smallest_kept
from feather_param.ops.unit_magnitudes import root_mean_square, smallest

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_the_root_of_the_mean_of_the_squares_is_that_of_the_twin(dtype, rows, scale):
    values = (torch.randn(rows, 50, generator=torch.Generator().manual_seed(rows)) * scale).to(dtype)
    found = root_mean_square(values)
    expected = [math.sqrt(math.fsum(x * x for x in column) / rows) for column in values.double().T.tolist()]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eps = torch.finfo(found.dtype).eps
    # In float64: half an ulp of each of log2(rows) + 1 sums, halved by the root, and three more roundings.
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=4 * eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_magnitude_is_zero_only_if_all_the_values_are(dtype):
    values = torch.zeros(4, 3, dtype=dtype)
    values[2, 1] = smallest_kept(dtype)
    values[0, 2] = torch.finfo(dtype).max
    found = root_mean_square(values)
    assert found[0] == 0
    assert found[1] > 0
    assert found[2].isfinite()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_can_be_seen(dtype, value):
    values = torch.ones(4, 2, dtype=dtype)
    values[3, 1] = value
    assert root_mean_square(values).isfinite().tolist() == [True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [4, 6])
@pytest.mark.filterwarnings("ignore:Skipping serialization")  # by the inductor of torch 2.6
def test_compiled_code_computes_the_same_bits(dtype, rows):
    torch._dynamo.reset()
    values = torch.randn(rows, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    assert torch.equal(torch.compile(root_mean_square, fullgraph=True)(values), root_mean_square(values))


@pytest.mark.parametrize("columns", [2, 3, 4, 8])
def test_the_smallest_are_those_of_a_sort(columns):
    values = torch.randint(5, (100, columns), generator=torch.Generator().manual_seed(0)).float()
    for count in range(1, columns):
        found, others = smallest(values.unbind(1), count)
        assert torch.equal(torch.stack(found, 1), values.sort(1).values[:, :count])
        both = torch.stack([*found, *others], 1)
        assert torch.equal(both.sort(1).values, values.sort(1).values)

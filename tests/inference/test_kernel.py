"""The compiled kernel computes the sum of slices."""

from __future__ import annotations

import numpy as np

from feather_param.inference import kernel


def test_the_compiled_sum_is_the_plain_one():
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((5, 11)).astype(np.float32) * (rng.random((5, 11)) < 0.6)
    crow = np.append(0, (dense != 0).sum(1).cumsum()).astype(np.int32)
    col = np.nonzero(dense)[1].astype(np.int32)
    starts = rng.integers(0, 30, 11)
    x, bias = rng.standard_normal(60).astype(np.float32), rng.standard_normal(5).astype(np.float32)
    plain, fast = np.zeros((5, 30), np.float32), np.zeros((5, 30), np.float32)
    arguments = (crow, col, dense[dense != 0], starts, x, bias)
    kernel.sum_of_slices(*arguments, plain, 27)
    compiled = kernel.compiled()
    assert compiled is not None
    compiled(*arguments, fast, 27)
    slices = np.stack([x[start : start + 27] for start in starts])
    bound = 13 * np.finfo(np.float32).eps * (np.abs(dense) @ np.abs(slices) + np.abs(bias)[:, None])
    for out in (plain, fast):
        assert (np.abs(out[:, :27] - (dense.astype(np.float64) @ slices + bias[:, None])) <= bound).all()
        assert (out[:, 27:] == 0).all()

"""Load the Triton kernels on the GPUs that can run them."""

from __future__ import annotations

import importlib
import math
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch


class Kernels(NamedTuple):
    """The modules with the kernels; importing them imports triton."""

    kth: ModuleType
    operator: ModuleType


@cache
def kernels(device: torch.device) -> Kernels | None:
    """Return the kernels for a GPU, or None if one of them does not run there.

    Each kernel is compiled and run on one element. Triton may be missing, or the C compiler that it calls, or Triton
    may not support the GPU or bfloat16 on it. Each case raises another type of exception, so all are caught.
    """
    try:
        kth = importlib.import_module("feather_param.ops.kth_triton")
        operator = importlib.import_module("feather_param.ops.operator_triton")
        one = torch.ones(1, dtype=torch.bfloat16, device=device)
        histograms = torch.zeros(1, 256, dtype=torch.int64, device=device)
        programs = torch.tensor([[0, 1, 1024, 0]], device=device)
        kth.add_histograms(histograms, one, programs, one.new_zeros(1, dtype=torch.int32), 23, 8)
        operator.shrink(one, one[0].float(), math.inf, one, None)
    except Exception:
        return None
    return Kernels(kth, operator)

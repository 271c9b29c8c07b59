"""Train any unmodified PyTorch model to an exact global sparsity, with Feather (BMVC 2023)."""

from feather_param import allocations, inference, parametrizations, patterns, reports, schedules
from feather_param.api import baked_state_dict, desparsify, save_sparse, sparsify
from feather_param.controller import Controller
from feather_param.files.sparse import load_sparse
from feather_param.inference.convert import to_sparse_inference
from feather_param.reports.plan import plan

__all__ = [
    "Controller",
    "allocations",
    "baked_state_dict",
    "desparsify",
    "inference",
    "load_sparse",
    "parametrizations",
    "patterns",
    "plan",
    "reports",
    "save_sparse",
    "schedules",
    "sparsify",
    "to_sparse_inference",
]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

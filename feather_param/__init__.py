"""Train any unmodified PyTorch model to an exact global sparsity, with Feather (BMVC 2023)."""

from feather_param import parametrizations as parametrizations
from feather_param import schedules as schedules
from feather_param.api import baked_state_dict as baked_state_dict
from feather_param.api import desparsify as desparsify
from feather_param.api import sparsify as sparsify
from feather_param.controller import Controller as Controller
from feather_param.files.sparse import load_sparse as load_sparse
from feather_param.files.sparse import save_sparse as save_sparse
from feather_param.inference.convert import to_sparse_inference as to_sparse_inference
from feather_param.reports.plan import plan as plan

__all__ = [
    "Controller",
    "baked_state_dict",
    "desparsify",
    "load_sparse",
    "parametrizations",
    "plan",
    "save_sparse",
    "schedules",
    "sparsify",
    "to_sparse_inference",
]
__version__ = "0.1.0"

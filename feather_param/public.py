"""The public names of ``feather_param``, which imports this module when the first of them is used."""

import feather_param.allocations as allocations
import feather_param.inference as inference
import feather_param.parametrizations as parametrizations
import feather_param.patterns as patterns
import feather_param.reports as reports
import feather_param.schedules as schedules
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

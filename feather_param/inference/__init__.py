"""Faster inference of pruned models: sparse layers on a CPU, 2:4 weights on a GPU, and BatchNorm recalibration."""

from feather_param.inference.batchnorm import recalibrate_batchnorm
from feather_param.inference.choices import Choices, load_choices
from feather_param.inference.convert import to_sparse_inference
from feather_param.inference.report import InferenceReport, InferenceRow
from feather_param.inference.semi_structured import is_semi_structured, to_semi_structured

__all__ = [
    "Choices",
    "InferenceReport",
    "InferenceRow",
    "is_semi_structured",
    "load_choices",
    "recalibrate_batchnorm",
    "to_semi_structured",
    "to_sparse_inference",
]

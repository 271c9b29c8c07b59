"""Train any unmodified PyTorch model to an exact global sparsity, with Feather (BMVC 2023)."""

from feather_param import parametrizations as parametrizations
from feather_param import schedules as schedules
from feather_param.controller import Controller as Controller
from feather_param.controller import baked_state_dict as baked_state_dict
from feather_param.controller import desparsify as desparsify
from feather_param.controller import sparsify as sparsify

__all__ = ["Controller", "baked_state_dict", "desparsify", "parametrizations", "schedules", "sparsify"]
__version__ = "0.1.0"

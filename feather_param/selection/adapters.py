"""Layers that an adapter library adds to a model (peft). They stay dense unless ``include`` names their weights."""

from __future__ import annotations

import re
from collections.abc import Container

# The names of peft (lora_A, lora_embedding_B, ...) and of diffusers. Other names with lora_ may be anything.
_LOW_RANK = re.compile(r"lora_(?:(?:embedding_)?[A-Z]|down|up)")
_KEPT, _TRAINED = "original_module", "modules_to_save"  # the two attributes of peft's ModulesToSaveWrapper


def why_dense(module: str, modules: Container[str]) -> str:
    """Return why a module of an adapter library stays dense by default, or "" for any other module.

    A low-rank adapter has few elements, all of which are used. A merge adds their product to another weight. Of a
    layer in ``modules_to_save``, peft trains a copy and drops the original in the end. Zeros in either would be counted
    in the rate, and would not be in the merged model.

    Args:
        module: name of the module.
        modules: the names of all modules of the model.

    Example:
        >>> why_dense("encoder.query.lora_A.default", {})
        'a low-rank adapter'
        >>> why_dense("head.original_module", {"head.modules_to_save"})
        'replaced by the copy in modules_to_save'
        >>> why_dense("encoder.query.base_layer", {})
        ''
    """
    parts = module.split(".")
    if any(map(_LOW_RANK.fullmatch, parts)):
        return "a low-rank adapter"
    for i, part in enumerate(parts):
        if part == _KEPT and ".".join([*parts[:i], _TRAINED]) in modules:
            return f"replaced by the copy in {_TRAINED}"
    return ""

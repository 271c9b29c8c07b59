"""Which layers of a network are faster sparse, on one kind of machine; they can be stored beside the weights."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

import torch

from feather_param.files.safetensors import open_container, parse_json
from feather_param.utils.extras import extra
from feather_param.utils.text import printable

_KEY = "feather_param inference"  # of a sparse file's metadata
_NETWORKS = ("dense", "fused", "sparse")


@dataclass(frozen=True)
class Choices:
    """What `to_sparse_inference` found to be faster. `save_sparse` stores it, `load_choices` loads it.

    Example:
        >>> Choices("x86_64 znver4, torch 2.6", 1, "sparse", ("fc",)).sparse
        ('fc',)
    """

    machine: str  # processor and version of torch that the timings hold for
    threads: int
    network: str  # "dense": the model as it is; "fused": with folded batch norms; "sparse": with sparse layers too
    sparse: tuple[str, ...]  # names of the sparse layers
    untraced: str = ""  # why the model could not be fused

    @property
    def metadata(self) -> dict[str, str]:
        """The choices as metadata of a safetensors file."""
        return {_KEY: json.dumps(asdict(self), separators=(",", ":"))}

    @property
    def hold_here(self) -> bool:
        """Whether they were timed on this kind of machine, with this version of torch and this number of threads."""
        return (self.machine, self.threads) == (machine(), torch.get_num_threads())


def machine() -> str:
    """Return the processor and the version of torch."""
    binding = extra("llvmlite.binding")
    return f"{binding.get_default_triple().partition('-')[0]} {binding.get_host_cpu_name()}, torch {torch.__version__}"


def load_choices(path: str | os.PathLike[str]) -> Choices | None:
    """Load the choices that `save_sparse` stored in a file, for `to_sparse_inference`.

    Returns:
        The choices, or None if the file has none.

    Raises:
        TypeError: ``path`` is not a path.
        ValueError: the file is no safetensors file, or its choices are damaged.
        OSError: the file cannot be read.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> feather_param.save_sparse({"w": torch.eye(100)}, path, choices=Choices("a machine", 1, "fused", ()))
        >>> load_choices(path).network
        'fused'
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"expected a path, got {type(path).__name__}")
    try:
        text = (open_container(path).metadata() or {}).get(_KEY)
    except (ValueError, RecursionError) as error:
        got = f"got {printable(path)}, which is damaged or another one ({printable(error)})"
        raise ValueError(f"expected a safetensors file, {got}") from error
    if text is None:
        return None
    try:
        content = parse_json(text)
        kinds = {"machine": str, "threads": int, "network": str, "sparse": list, "untraced": str}
        if {name: type(value) for name, value in content.items()} != kinds or content["network"] not in _NETWORKS:
            raise ValueError("a key is missing, unknown or of another type")
        if not all(isinstance(name, str) for name in content["sparse"]):
            raise ValueError("the name of a layer is no string")
        if content["sparse"] and content["network"] != "sparse":
            raise ValueError("a network without sparse layers names some")
    except (ValueError, RecursionError) as error:
        got = f"got damaged ones in {printable(path)}: {printable(error)}"
        raise ValueError(f"expected choices of save_sparse, {got}; convert without them") from error
    return Choices(**{**content, "sparse": tuple(content["sparse"])})

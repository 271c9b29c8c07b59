"""How the sparsity of a model came about: who survived, and who entered and left, over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from feather_param.controller import Controller
from feather_param.utils.checks import require_same_shapes
from feather_param.utils.text import aligned

__all__ = ["History", "LayerLook", "Look"]

_VERSION = 1


@dataclass(frozen=True)
class LayerLook:
    """One weight at one look: elements that survive, and those that entered and left since the look before."""

    name: str
    total: int
    survivors: int
    entered: int
    left: int


@dataclass(frozen=True)
class Look:
    """All weights at one look."""

    step: int  # optimizer steps made
    rate: float  # the scheduled one
    threshold: float
    layers: tuple[LayerLook, ...]  # the prunable weights in the model's order

    @property
    def total(self) -> int:
        """Number of prunable weights."""
        return sum(layer.total for layer in self.layers)

    @property
    def survivors(self) -> int:
        """Number of those that survive."""
        return sum(layer.survivors for layer in self.layers)

    @property
    def entered(self) -> int:
        """Number of survivors that were pruned at the look before."""
        return sum(layer.entered for layer in self.layers)

    @property
    def left(self) -> int:
        """Number of pruned ones that survived at the look before."""
        return sum(layer.left for layer in self.layers)


class History:
    """Watch the masks of a model in training: call `look` once in a while, once an epoch for example.

    A weight survives if `desparsify` would leave it at that moment. The first look is taken at once. The masks of
    the last look are kept in memory, one bit a weight; a look takes about as long as baking the model would.

    Attributes:
        looks: all looks so far, the oldest first.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight = nn.Parameter(torch.tensor([[1.0, -2.0], [-4.0, 3.0]]))
        >>> controller = feather_param.sparsify(layer, final_rate=0.5, total_steps=2, end_step=1)
        >>> history = History(controller)
        >>> controller.step()
        >>> _ = history.look()
        >>> with torch.no_grad():
        ...     layer.parametrizations.weight.original[0, 0] = 5.0
        >>> controller.step()
        >>> history.look().entered
        1
        >>> print(history)
        step  rate     threshold  survivors  entered  left
        0     0.000%           0          4        0     0
        1     50.000%          2          2        0     2
        2     50.000%          3          2        1     1
    """

    def __init__(self, controller: Controller) -> None:
        if not isinstance(controller, Controller):
            raise TypeError(f"expected the controller that sparsify returns, got {type(controller).__name__}")
        self._controller = controller
        self._shapes: dict[str, list[int]] = {}
        self._masks: dict[str, NDArray[np.uint8]] = {}
        self.looks: list[Look] = []
        self.look()

    def look(self) -> Look:
        """Append a look at the model as it is now, and return it.

        Raises:
            RuntimeError: the model has been desparsified.
            ValueError: a weight holds NaN or infinity.
        """
        controller = self._controller
        masks = controller.masks()
        packed = {name: np.packbits(mask.cpu().numpy()) for name, mask in masks.items()}
        layers: list[LayerLook] = []
        for name, now in packed.items():
            before = self._masks.get(name, now)
            entered, left = _count(now & ~before), _count(before & ~now)
            layers.append(LayerLook(name, masks[name].numel(), _count(now), entered, left))
        self._shapes = {name: list(mask.shape) for name, mask in masks.items()}
        self._masks = packed
        self.looks.append(Look(controller.step_count, controller.rate, float(controller.threshold), tuple(layers)))
        return self.looks[-1]

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on: plain values and uint8 tensors, which ``weights_only=True`` loads."""
        return {
            "version": _VERSION,
            "shapes": self._shapes,
            "masks": {name: torch.from_numpy(mask.copy()) for name, mask in self._masks.items()},
            "looks": [
                {
                    "step": look.step,
                    "rate": look.rate,
                    "threshold": look.threshold,
                    "layers": [[layer.survivors, layer.entered, layer.left] for layer in look.layers],
                }
                for look in self.looks
            ],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where the history of the same model was saved; the looks taken here so far are forgotten.

        Raises:
            ValueError: it is the state of another model or version, or none; the history is then untouched.
        """
        if not isinstance(state_dict, Mapping) or not {"version", "shapes", "masks", "looks"} <= state_dict.keys():
            raise ValueError("expected the state_dict of a History, got something else")
        if state_dict["version"] != _VERSION:
            raise ValueError(
                f"expected a history state of version {_VERSION}, got {state_dict['version']}; "
                "load it with the feather_param release that wrote it"
            )
        theirs = {name: list(shape) for name, shape in state_dict["shapes"].items()}
        require_same_shapes("the history", self._shapes, theirs)
        totals = {name: math.prod(shape) for name, shape in theirs.items()}
        self._masks = {name: mask.cpu().numpy().copy() for name, mask in state_dict["masks"].items()}
        self.looks = [
            Look(
                look["step"],
                look["rate"],
                look["threshold"],
                tuple(
                    LayerLook(name, totals[name], *counts) for name, counts in zip(totals, look["layers"], strict=True)
                ),
            )
            for look in state_dict["looks"]
        ]

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [("step", "rate", "threshold", "survivors", "entered", "left")]
        for look in self.looks:
            counts = (f"{count:,}" for count in (look.survivors, look.entered, look.left))
            cells.append((f"{look.step:,}", f"{look.rate:.3%}", f"{look.threshold:.4g}", *counts))
        return "\n".join(aligned(cells))


def _count(bits: NDArray[np.uint8]) -> int:
    return int(np.bitwise_count(bits).sum(dtype=np.int64))

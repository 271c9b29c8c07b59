"""The history of the masks: how many elements survive, enter and leave over the steps."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feather_param.utils.checks import require_same_shapes
from feather_param.utils.text import aligned, printable

_VERSION = 1
_NEEDED = ("masks", "step_count", "rate", "threshold")


class Masked(Protocol):
    """The attributes of a `Controller` that a history reads."""

    @property
    def step_count(self) -> int: ...
    @property
    def rate(self) -> float: ...
    @property
    def threshold(self) -> Tensor: ...
    def masks(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class LayerRecord:
    """The counts of one weight in a record.

    Attributes:
        name: its name.
        total: number of elements.
        survivors: number of elements that survive.
        entered: number of survivors that were pruned in the record before.
        left: number of pruned elements that survived in the record before.
    """

    name: str
    total: int
    survivors: int
    entered: int
    left: int


@dataclass(frozen=True)
class Record:
    """The counts of all weights at one step.

    Attributes:
        step: number of optimizer steps made.
        rate: the scheduled rate.
        threshold: the threshold.
        layers: the prunable weights in the model's order.
    """

    step: int
    rate: float
    threshold: float
    layers: tuple[LayerRecord, ...]

    @property
    def total(self) -> int:
        """Number of elements of all prunable weights."""
        return sum(layer.total for layer in self.layers)

    @property
    def survivors(self) -> int:
        """Number of elements that survive."""
        return sum(layer.survivors for layer in self.layers)

    @property
    def entered(self) -> int:
        """Number of survivors that were pruned in the record before."""
        return sum(layer.entered for layer in self.layers)

    @property
    def left(self) -> int:
        """Number of pruned elements that survived in the record before."""
        return sum(layer.left for layer in self.layers)


class History:
    """Record the masks of a model in training. Call `record` now and then, for example once an epoch.

    An element survives if `desparsify` would keep it at that moment. The constructor makes the first record. The
    history keeps the masks of the last record in memory, one bit for each element. A record takes about as long as
    baking.

    Args:
        controller: the controller that `sparsify` returned.

    Attributes:
        records: all records, the oldest first.

    Raises:
        TypeError: ``controller`` is no controller.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight = nn.Parameter(torch.tensor([[1.0, -2.0], [-4.0, 3.0]]))
        >>> controller = feather_param.sparsify(layer, final_rate=0.5, total_steps=2, end_step=1)
        >>> history = History(controller)
        >>> controller.step()
        >>> _ = history.record()
        >>> with torch.no_grad():
        ...     layer.parametrizations.weight.original[0, 0] = 5.0
        >>> controller.step()
        >>> history.record().entered
        1
        >>> print(history)
        step  rate     threshold  survivors  entered  left
        0     0.000%           0          4        0     0
        1     50.000%          2          2        0     2
        2     50.000%          3          2        1     1
    """

    def __init__(self, controller: Masked) -> None:
        # Not hasattr: it would evaluate the properties.
        if any(inspect.getattr_static(controller, name, None) is None for name in _NEEDED):
            raise TypeError(f"expected the controller that sparsify returns, got {type(controller).__name__}")
        self._controller = controller
        self._shapes: dict[str, list[int]] = {}
        self._masks: dict[str, NDArray[np.uint8]] = {}
        self.records: list[Record] = []
        self.record()

    def record(self) -> Record:
        """Append a record of the model as it is now, and return it.

        Raises:
            RuntimeError: the model has been desparsified, or a weight has no values.
            ValueError: a weight holds NaN or infinity.
        """
        controller = self._controller
        masks = controller.masks()
        packed = {name: np.packbits(mask.cpu().numpy()) for name, mask in masks.items()}
        layers: list[LayerRecord] = []
        for name, now in packed.items():
            before = self._masks.get(name, now)
            entered, left = _count(now & ~before), _count(before & ~now)
            layers.append(LayerRecord(name, masks[name].numel(), _count(now), entered, left))
        self._shapes = {name: list(mask.shape) for name, mask in masks.items()}
        self._masks = packed
        self.records.append(Record(controller.step_count, controller.rate, float(controller.threshold), tuple(layers)))
        return self.records[-1]

    def state_dict(self) -> dict[str, Any]:
        """Return the records and the last masks: plain values and uint8 tensors, which ``weights_only=True`` loads."""
        return {
            "version": _VERSION,
            "shapes": self._shapes,
            "masks": {name: torch.from_numpy(mask.copy()) for name, mask in self._masks.items()},
            "records": [
                {
                    "step": record.step,
                    "rate": record.rate,
                    "threshold": record.threshold,
                    "layers": [[layer.survivors, layer.entered, layer.left] for layer in record.layers],
                }
                for record in self.records
            ],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a saved history of the same model. It replaces the records made so far.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            ValueError: it is not the state of a history, or is of another model or version. This history is unchanged.
        """
        if not isinstance(state_dict, Mapping) or not {"version", "shapes", "masks", "records"} <= state_dict.keys():
            raise ValueError("expected the state_dict of a History, got something else")
        if state_dict["version"] != _VERSION:
            raise ValueError(
                f"expected a history state of version {_VERSION}, got {printable(state_dict['version'])}; "
                "load it with the feather_param release that wrote it"
            )
        theirs = {name: list(shape) for name, shape in state_dict["shapes"].items()}
        require_same_shapes("the history", self._shapes, theirs)
        totals = {name: math.prod(shape) for name, shape in theirs.items()}
        self._masks = {name: mask.cpu().numpy().copy() for name, mask in state_dict["masks"].items()}
        self.records = [
            Record(
                record["step"],
                record["rate"],
                record["threshold"],
                tuple(
                    LayerRecord(name, totals[name], *counts)
                    for name, counts in zip(totals, record["layers"], strict=True)
                ),
            )
            for record in state_dict["records"]
        ]

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [("step", "rate", "threshold", "survivors", "entered", "left")]
        for record in self.records:
            counts = (f"{count:,}" for count in (record.survivors, record.entered, record.left))
            cells.append((f"{record.step:,}", f"{record.rate:.3%}", f"{record.threshold:.4g}", *counts))
        return "\n".join(aligned(cells))


def _count(bits: NDArray[np.uint8]) -> int:
    return int(np.bitwise_count(bits).sum(dtype=np.int64))

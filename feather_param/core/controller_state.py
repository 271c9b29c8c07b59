"""The saved state of a controller: its settings and its position, as plain Python values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from feather_param.core.config import Config
from feather_param.core.position import Position
from feather_param.utils.checks import integer, require_same_shapes
from feather_param.utils.text import printable

_VERSION = 1


def saved(config: Config, shapes: Mapping[str, list[int]], position: Position) -> dict[str, Any]:
    """Return the state of a controller.

    Args:
        config: its settings.
        shapes: the shape of each weight, by name.
        position: its position.
    """
    return {
        "version": _VERSION,
        **config.saved,
        "weights": shapes,
        "step_count": position.step,
        "frozen_step": position.frozen_step,
    }


def position_in(state: Any, config: Config, shapes: Mapping[str, list[int]]) -> tuple[int, int | None]:
    """Return the step and the frozen step of a state that `saved` returned, for the same settings and shapes.

    Raises:
        ValueError: the state is something else, or has another version, other settings or shapes.
    """
    if not isinstance(state, Mapping) or not {"version", "step_count", "frozen_step"} <= state.keys():
        raise ValueError("expected the state_dict of a feather_param Controller, got something else")
    if state["version"] != _VERSION:
        raise ValueError(
            f"expected a controller state of version {_VERSION}, got {printable(state['version'])}; "
            "load it with the feather_param release that wrote it"
        )
    config.require_same(state)
    require_same_shapes("a controller state", shapes, state.get("weights"))
    frozen = state["frozen_step"]
    return integer("step_count", state["step_count"], 0), None if frozen is None else integer("frozen_step", frozen, 0)

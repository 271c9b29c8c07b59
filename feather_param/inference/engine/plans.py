"""The plans that a layer keeps."""

from __future__ import annotations

from typing import Any

from feather_param.inference.engine.plan import Plan

_MOST_PLANS = 16  # of a layer; a plan has an int32 for each column


class Plans:
    """The newest plans of a layer, by the shape of the input and all else on which they depend."""

    def __init__(self) -> None:
        self._plans: dict[Any, Plan] = {}

    def __len__(self) -> int:
        return len(self._plans)

    def get(self, key: Any) -> Plan | None:
        """Return a plan."""
        return self._plans.get(key)

    def add(self, key: Any, plan: Plan) -> Plan:
        """Keep a plan and return it."""
        newest = [*self._plans.items()][1 - _MOST_PLANS :]
        self._plans = dict([*newest, (key, plan)])  # a new dict, as other threads may read the old one
        return plan

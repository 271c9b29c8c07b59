"""The settings that a saved state needs to be baked without its model."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import feather_param.allocations as allocations
import feather_param.patterns as patterns
from feather_param.allocations import Allocation
from feather_param.core.config import Config
from feather_param.patterns import Pattern
from feather_param.utils.checks import takes
from feather_param.utils.text import name_of


@dataclass(frozen=True)
class BakeSettings:
    """The settings that a saved state needs to be baked without its model, in plain values.

    Attributes:
        p: the exponent of the operator.
        pattern: the name of the pattern.
        allocation: the name of the allocation if it is one of `feather_param.allocations`. Otherwise None: the state
            then holds the zeros of each group of weights.
        max_rate: largest fraction of zeros of a weight.
        min_nonzero: smallest number of elements that a weight keeps.
        weights: the weights in the model's order. Each has a list of its other names: a tied weight has several.
        stacked: the weights that carry parametrizations of other libraries as well.

    Example:
        >>> settings = BakeSettings(3.0, "blocks(1, 4)", "erk", 1.0, 0, {"0.weight": ()}, ())
        >>> settings.known_pattern, settings.known_allocation.__name__
        (blocks(1, 4), 'erk')
        >>> BakeSettings.parsed(settings.text()) == settings
        True
    """

    p: float
    pattern: str
    allocation: str | None
    max_rate: float
    min_nonzero: int
    weights: Mapping[str, tuple[str, ...]]
    stacked: tuple[str, ...]

    @classmethod
    def of(cls, config: Config, weights: Mapping[str, tuple[str, ...]], stacked: tuple[str, ...]) -> BakeSettings:
        """Return the settings of a training."""
        assert config.max_rate_per_layer is not None
        name = name_of(config.allocation)
        known = _allocation(name) is config.allocation
        return cls(
            config.p,
            str(config.pattern),
            name if known else None,
            config.max_rate_per_layer,
            config.min_nonzero_per_layer,
            weights,
            stacked,
        )

    def text(self) -> str:
        """Return the settings as JSON. The length depends on the settings only, not on the position."""
        return json.dumps(vars(self), separators=(",", ":"))

    @classmethod
    def parsed(cls, text: str) -> BakeSettings:
        """Return the settings that `text` returned.

        Raises:
            ValueError: it is another text.
        """
        try:
            found = json.loads(text)
            settings = cls(
                p=float(found["p"]),
                pattern=str(found["pattern"]),
                allocation=None if found["allocation"] is None else str(found["allocation"]),
                max_rate=float(found["max_rate"]),
                min_nonzero=int(found["min_nonzero"]),
                weights={str(name): tuple(map(str, names)) for name, names in found["weights"].items()},
                stacked=tuple(map(str, found["stacked"])),
            )
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"a setting is missing or of another type: {error}") from error
        if not (settings.p > 0 and 0 < settings.max_rate <= 1 and settings.min_nonzero >= 0 and settings.weights):
            raise ValueError("a setting is out of its range")
        return settings

    @property
    def known_pattern(self) -> Pattern | None:
        """The pattern, or None if it is none of `feather_param.patterns`."""
        match = re.fullmatch(r"(\w+)(?:\((\d+), (\d+)\))?", self.pattern)
        if match is None or match[1] not in patterns.__all__:
            return None
        made = getattr(patterns, match[1])
        if match[2] is not None:
            try:
                made = made(int(match[2]), int(match[3]))
            except (TypeError, ValueError):
                return None
        return made if isinstance(made, Pattern) else None

    @property
    def known_allocation(self) -> Allocation | None:
        """The allocation, or None if it is none of `feather_param.allocations`."""
        return None if self.allocation is None else _allocation(self.allocation)


def _allocation(name: str) -> Allocation | None:
    found = getattr(allocations, name) if name in allocations.__all__ else None
    # The others are types, and functions that make an allocation or help to write one.
    return found if inspect.isfunction(found) and takes(found, 3) else None

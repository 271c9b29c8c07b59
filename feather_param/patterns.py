"""Patterns: which elements are pruned together.

A pattern divides each weight into *units*. Allocations, thresholds and masks see the magnitudes of the units in the
place of the elements. A unit is pruned as a whole. The default, `elements`, prunes each element by itself.

Shapes: `n_m` and `blocks` take a weight as it is stored. Dimension 0 has the outputs of Linear and Conv layers, and
dimension 1 their inputs. A transposed convolution and the ``Conv1D`` of transformers store them the other way round.

To add a pattern, write a subclass of `Pattern`. Its docstring says what to define.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from feather_param.allocations import Allocation
from feather_param.ops.count import PruneCount, count_above
from feather_param.ops.distributed import is_sharded
from feather_param.ops.dtypes import rounded_down
from feather_param.ops.groups import Group, count_zeros, group_each, masks, require_total
from feather_param.ops.operator import feather_threshold
from feather_param.ops.operator_units import shrink_units
from feather_param.ops.unit_magnitudes import root_mean_square, smallest
from feather_param.utils.checks import integer
from feather_param.utils.split import split
from feather_param.utils.text import LONGEST_MESSAGE, listed, name_of, printable

__all__ = ["Pattern", "blocks", "elements", "n_m"]


class Pattern:
    """A division of weights into units that are pruned as a whole.

    A subclass defines `units`, `mask`, `shrink`, `misfit` and ``__repr__``, and the attributes if they differ. Its
    ``repr`` is its name in saved states: two patterns with the same name must be the same.

    Attributes:
        size: number of elements that become zero with one unit.
        largest_rate: the largest fraction of zeros in a weight.
    """

    size: int = 1
    largest_rate: float = 1.0

    def units(self, weight: Tensor) -> Tensor:
        """Return the magnitudes of the units that may be pruned, >= 0; not finite if an element is not."""
        raise NotImplementedError

    def mask(self, kept: Tensor, weight: Tensor) -> Tensor:
        """Return the mask of a weight's elements, given that of its units in the shape that `units` returns."""
        raise NotImplementedError

    def shrink(self, weight: Tensor, threshold: Tensor, theta: float | Tensor = 1.0, p: float = 3.0) -> Tensor:
        """Apply the operator with the magnitudes of the units; arguments and result as in `feather_threshold`."""
        raise NotImplementedError

    def misfit(self, shape: Sequence[int]) -> str | None:
        """Return what does not fit if weights of a shape cannot be divided into units, else None."""
        raise NotImplementedError

    def __repr__(self) -> str:
        raise NotImplementedError

    def require_fit(self, weights: Mapping[str, Tensor]) -> None:
        """Raise a ValueError that names the weights that cannot be divided into units."""
        found = {name: misfit for name, weight in weights.items() if (misfit := self.misfit(weight.shape))}
        if found:
            names = listed([f"{name} ({misfit})" for name, misfit in found.items()])
            hint = f"leave them dense with exclude={printable(list(found), LONGEST_MESSAGE)} (add your other globs)"
            raise ValueError(f"expected weights that {self} divides without a remainder, got {names}; {hint}")

    def allocate(
        self, allocation: Allocation, weights: Mapping[str, Tensor], zeros: int, guards: Mapping[str, int]
    ) -> list[Group]:
        """Call an allocation with numbers of elements, and return groups whose zeros are numbers of units.

        Raises:
            ValueError: a weight is sharded, there are fewer units, or the zeros do not add up.
        """
        units, count, limits = self.in_units(weights, zeros, guards)
        groups = allocation(self.allocated(weights), zeros, guards)
        require_total(groups, zeros, name_of(allocation))
        if any(len(group.names) > 1 for group in groups):  # it ranks magnitudes: those of the units
            groups = allocation(units, count, limits)
            require_total(groups, count, name_of(allocation))
            return groups
        most = {name: limits.get(name, each.numel()) for name, each in units.items()}
        given = {group.names[0]: group.zeros for group in groups if group.names}
        return group_each(units, split(count, given, dict.fromkeys(units, 0), most))

    def in_units(
        self, weights: Mapping[str, Tensor], zeros: int, guards: Mapping[str, int]
    ) -> tuple[Mapping[str, Tensor], int, Mapping[str, int]]:
        """Return the magnitudes of the units, and numbers of zero elements as numbers of units."""
        units = self._units_of(weights)
        total = self.size * sum(each.numel() for each in units.values())
        if zeros > total:
            raise ValueError(
                f"expected at most {total:,} zeros with {self}, got {zeros:,}; give sparsify the pattern of the run "
                "that saved this state"
            )
        limits = {name: most // self.size for name, most in guards.items() if most < self.size * units[name].numel()}
        return units, zeros // self.size, limits

    def allocated(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what an allocation is called with at first: the weights without values.

        If it ranks magnitudes, it returns a group of several weights, and is called again with those of the units.
        """
        return {name: weight.detach().to("meta") for name, weight in weights.items()}

    def survivors(self, weight: Tensor, threshold: Tensor) -> Tensor:
        """Return the number of elements that the operator does not make zero: int64, 0-dim. It does not wait."""
        return torch.count_nonzero(self._hard(weight, threshold))

    def _hard(self, weight: Tensor, threshold: Tensor) -> Tensor:
        """Return a weight with zeros where the operator makes zeros."""
        return self.shrink(weight.detach(), rounded_down(threshold, weight.dtype).to(weight.device), p=math.inf)

    def masks(self, weights: Mapping[str, Tensor], groups: Sequence[Group]) -> dict[str, Tensor]:
        """Return the mask of each weight, as `ops.groups.masks` does.

        A zero element of a kept unit is kept, and baked as a negligible number, so that the number of zeros is exact.
        If more elements are zero than the groups have zeros together, it is pruned like all zeros.
        """
        kept = masks(self._units_of(weights), groups)
        zeros = self.size * sum(group.zeros for group in groups)
        exceed = any(g.threshold == 0 for g in groups) and sum(int((w == 0).sum()) for w in weights.values()) > zeros
        found: dict[str, Tensor] = {}
        for group in groups:
            for name in group.names:
                weight = weights[name].detach()
                mask = self.mask(kept[name], weight)
                mask = mask & (weight != 0) if exceed and group.threshold == 0 else mask
                found[name] = torch.empty_like(weight, dtype=torch.bool).copy_(mask)  # in the weight's memory format
        return {name: found[name] for name in weights}

    def count_zeros(self, weights: Mapping[str, Tensor], groups: Sequence[Group]) -> dict[str, PruneCount]:
        """Count the zeros that each weight gets. Ties are the elements that are kept and compute as zero."""
        found = self.masks(weights, groups)
        counts: dict[str, PruneCount] = {}
        for group in groups:
            for name in group.names:
                ties = found[name] & (self._hard(weights[name], group.threshold) == 0)
                counts[name] = PruneCount(int((~found[name]).sum()), int(ties.sum()))
        return {name: counts[name] for name in weights}

    def _units_of(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, weight in weights.items():
            if is_sharded(weight):
                raise ValueError(
                    f"expected whole weights with {self}, got {printable(name)} sharded over processes; train with "
                    "DDP, or without pattern="
                )
        return {name: self.units(weight.detach()) for name, weight in weights.items()}


class _Elements(Pattern):
    """The pattern whose units are the elements. Its weights may be sharded, and it has the fastest computations."""

    def units(self, weight: Tensor) -> Tensor:
        return weight.detach().abs()

    def mask(self, kept: Tensor, weight: Tensor) -> Tensor:
        return kept

    def shrink(self, weight: Tensor, threshold: Tensor, theta: float | Tensor = 1.0, p: float = 3.0) -> Tensor:
        return feather_threshold(weight, threshold, theta, p)

    def misfit(self, shape: Sequence[int]) -> str | None:
        return None

    def allocate(
        self, allocation: Allocation, weights: Mapping[str, Tensor], zeros: int, guards: Mapping[str, int]
    ) -> list[Group]:
        groups = allocation(weights, zeros, guards)
        require_total(groups, zeros, name_of(allocation))
        return groups

    def in_units(
        self, weights: Mapping[str, Tensor], zeros: int, guards: Mapping[str, int]
    ) -> tuple[Mapping[str, Tensor], int, Mapping[str, int]]:
        return weights, zeros, guards

    def allocated(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return weights

    def survivors(self, weight: Tensor, threshold: Tensor) -> Tensor:
        return count_above(weight, threshold)

    def masks(self, weights: Mapping[str, Tensor], groups: Sequence[Group]) -> dict[str, Tensor]:
        return masks(weights, groups)

    def count_zeros(self, weights: Mapping[str, Tensor], groups: Sequence[Group]) -> dict[str, PruneCount]:
        return count_zeros(weights, groups)

    def __repr__(self) -> str:
        return "elements"


elements: Pattern = _Elements()
"""The default pattern: each element is pruned by itself."""


@dataclass(frozen=True, repr=False)
class _Blocks(Pattern):
    rows: int
    columns: int

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.rows * self.columns

    def __repr__(self) -> str:
        return f"blocks({self.rows}, {self.columns})"

    def misfit(self, shape: Sequence[int]) -> str | None:
        rows, columns = shape[0], math.prod(shape[1:])
        return f"{rows} x {columns}" if rows % self.rows or columns % self.columns else None

    def units(self, weight: Tensor) -> Tensor:
        return self._magnitudes(self._tiles(weight))

    def mask(self, kept: Tensor, weight: Tensor) -> Tensor:
        return kept[:, None, :, None].expand_as(self._tiles(weight)).reshape(weight.shape)

    def shrink(self, weight: Tensor, threshold: Tensor, theta: float | Tensor = 1.0, p: float = 3.0) -> Tensor:
        tiles = self._tiles(weight)
        magnitude = self._magnitudes(tiles.detach())[:, None, :, None]
        value = shrink_units(tiles, magnitude, threshold, theta, p).reshape(weight.shape)
        # The tiles of a weight in channels-last format are a copy. The result gets that format again.
        return value if value.stride() == weight.stride() else torch.empty_like(weight).copy_(value)

    def _tiles(self, weight: Tensor) -> Tensor:
        """Return a weight as [blocks down, rows, blocks across, columns]."""
        rows, columns = weight.shape[0], math.prod(weight.shape[1:])
        return weight.reshape(rows // self.rows, self.rows, columns // self.columns, self.columns)

    def _magnitudes(self, tiles: Tensor) -> Tensor:
        """Return the root mean square of each block, [blocks down, blocks across]."""
        return root_mean_square(tiles.permute(1, 3, 0, 2).flatten(0, 1))


@dataclass(frozen=True, repr=False)
class _NM(Pattern):
    n: int
    m: int

    @property
    def largest_rate(self) -> float:  # type: ignore[override]
        return (self.m - self.n) / self.m

    def __repr__(self) -> str:
        return f"n_m({self.n}, {self.m})"

    def misfit(self, shape: Sequence[int]) -> str | None:
        return f"{shape[1]} inputs" if shape[1] % self.m else None

    def units(self, weight: Tensor) -> Tensor:
        found, others = smallest(self._groups(weight).abs().unbind(2), self.m - self.n)
        largest = functools.reduce(torch.maximum, others)
        not_finite = 0.0 * largest  # NaN if an element of the group is not finite, else 0
        return torch.stack([each + not_finite for each in found], 2).flatten(1, 2)

    def mask(self, kept: Tensor, weight: Tensor) -> Tensor:
        groups = self._groups(weight)
        order = groups.abs().sort(dim=2, stable=True).indices
        kept = kept.reshape(*groups.shape[:2], self.m - self.n, *groups.shape[3:])
        mask = torch.ones_like(groups, dtype=torch.bool).scatter(2, order[:, :, : self.m - self.n], kept)
        return mask.reshape(weight.shape)

    def shrink(self, weight: Tensor, threshold: Tensor, theta: float | Tensor = 1.0, p: float = 3.0) -> Tensor:
        groups = self._groups(weight)
        magnitude = groups.detach().abs()
        magnitude = magnitude if magnitude.dtype == torch.float64 else magnitude.float()
        limit = smallest(magnitude.unbind(2), self.m - self.n)[0][-1]
        return shrink_units(groups, magnitude, torch.minimum(limit, threshold)[:, :, None], theta, p).flatten(1, 2)

    def _groups(self, weight: Tensor) -> Tensor:
        """Return a weight as [outputs, groups, m, ...], a view."""
        return weight.unflatten(1, (weight.shape[1] // self.m, self.m))


def n_m(n: int, m: int) -> Pattern:
    """Keep at least n of every m consecutive inputs of an output: at most m - n of them are pruned.

    A group has m consecutive elements along dimension 1: the inputs of a Linear layer, the input channels of a
    convolution at one kernel position. Only the m - n smallest magnitudes of a group may be pruned, and the schedule
    prunes the smallest of all these first. So ``final_rate`` is at most ``1 - n / m``. At this rate each group has
    exactly n elements that are not zero, and `feather_param.inference.to_semi_structured` takes a model that was pruned
    with ``n_m(2, 4)`` and ``final_rate=0.5``.

    The operator acts on the magnitude of the element, with the smaller of the threshold and the (m - n)-th smallest
    magnitude of the group. Of equal magnitudes in a group, the first ones are pruned.

    Args:
        n: the number of elements of each group that cannot be pruned, at least 1.
        m: the number of elements of a group, more than n. The cost of a forward pass grows with m (m - n).

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument is no int.

    Source: N:M sparsity of NVIDIA's sparse tensor cores (https://arxiv.org/abs/2104.08378).

    Example:
        >>> layer = nn.Linear(4, 1)
        >>> layer.weight = nn.Parameter(torch.tensor([[1.0, -2.0, 4.0, 3.0]]))
        >>> feather_param.sparsify(layer, final_rate=0.5, total_steps=1, end_step=0, pattern=n_m(2, 4)).masks()
        {'weight': tensor([[False, False,  True,  True]])}
    """
    n, m = integer("n", n, 1), integer("m", m, 2)
    if n >= m:
        raise ValueError(f"expected n < m, got n_m({n}, {m}), which prunes nothing")
    return _NM(n, m)


def blocks(rows: int, columns: int) -> Pattern:
    """Prune blocks of neighbouring outputs and inputs together, by their root mean square.

    A weight is taken as the matrix ``weight.flatten(1)``, [outputs, inputs * kernel positions], by which inference and
    block-sparse kernels multiply. A block has ``rows`` neighbouring rows and ``columns`` neighbouring columns of it. In
    a convolution, neighbouring columns are first the kernel positions of one input channel.

    The magnitude of a block is ``sqrt(mean(w^2))``, in float32, or float64 if the weight is float64. The number of
    zeros is the largest multiple of ``rows * columns`` up to ``round(rate * N)``.

    Args:
        rows: number of neighbouring outputs, at least 1.
        columns: number of neighbouring inputs, at least 1.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument is no int.

    Source: block pruning (https://arxiv.org/abs/1711.02782), with the root mean square of a block for its magnitude.

    Example:
        >>> layer = nn.Linear(4, 1)
        >>> layer.weight = nn.Parameter(torch.tensor([[1.0, -2.0, 4.0, 0.0]]))
        >>> feather_param.sparsify(layer, final_rate=0.5, total_steps=1, end_step=0, pattern=blocks(1, 2)).masks()
        {'weight': tensor([[False, False,  True,  True]])}
    """
    return _Blocks(integer("rows", rows, 1), integer("columns", columns, 1))

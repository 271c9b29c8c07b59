"""Allocations: how many zeros each weight gets.

An allocation is a function from the weights and a number of zeros to groups of weights. The weights of a group are
ranked together, and the smallest magnitudes of the group are pruned. `global_magnitude` puts all weights into one
group. The others choose the zeros of each weight, and make one group for each weight.

To make an allocation from a formula, write one line:

>>> square_root = in_proportion(lambda name, weight: weight.numel() ** 0.5)  # the survivors of a weight

Any other allocation is a function that ends with `group_each`:

>>> def by_order(weights, zeros, guards):  # prunes whole weights, one after the other; it ignores the guards
...     given = {}
...     for name, weight in weights.items():
...         given[name] = min(weight.numel(), zeros - sum(given.values()))
...     return group_each(weights, given)
>>> by_order({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([4.0, 3.0])}, 3, {})
[Group(names=('a',), zeros=2, threshold=tensor(2.)), Group(names=('b',), zeros=1, threshold=tensor(3.))]

Its arguments:

* ``weights``: the dense weights by name. They may be on the meta device, or sharded over processes.
* ``zeros``: the number of zeros in all weights together, ``round(rate * N)``. The guards always leave room for it.
* ``guards``: the most zeros of a weight, by name. Weights without a guard are left out.

It must return a list of `Group`:

* Each weight is in exactly one group.
* The zeros of the groups add up to ``zeros``.
* The threshold of a group is the ``zeros``-th smallest magnitude of its weights, or 0 if it gets no zeros.
* No weight gets more zeros than its guard, except for elements that are zero anyway.

`sparsify` checks this once, for the final number of zeros. The library calls the allocation at each step and when it
computes the thresholds again. It prunes exactly the zeros of each group. If several magnitudes equal the threshold,
the first ones are pruned. More elements are zero only if they were zero before.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from feather_param.ops.count import count_pruned
from feather_param.ops.distributed import held_here, is_sharded
from feather_param.ops.dtypes import as_threshold
from feather_param.ops.groups import Group, count_zeros, group_each
from feather_param.ops.kth import kth_magnitude
from feather_param.ops.proportions import survivors_in_proportion, zeros_as_listed, zeros_in_proportion
from feather_param.ops.scores import deviations, lamp_scores
from feather_param.utils.by_name import checked_rates, listed_zeros, rates_by_name
from feather_param.utils.checks import takes
from feather_param.utils.globs import Globs
from feather_param.utils.text import name_of, printable

__all__ = [
    "Allocation",
    "Group",
    "erk",
    "from_plan",
    "global_magnitude",
    "group_each",
    "in_proportion",
    "lamp",
    "normalised",
    "per_layer",
    "square_root",
    "uniform",
]

Allocation = Callable[[Mapping[str, Tensor], int, Mapping[str, int]], list[Group]]
"""Divides zeros among weights: maps (weights by name, number of zeros, guards by name) to groups.

If the weights are sharded, all processes call it.
"""


def global_magnitude(weights: Mapping[str, Tensor], zeros: int, guards: Mapping[str, int]) -> list[Group]:
    """Prune the smallest magnitudes of all weights together, but in no weight more than its guard.

    The result equals that of a greedy rule. The rule visits all elements by magnitude, ties in the order of the weights
    and of their elements. It prunes an element unless its weight has reached its guard. Elements that are zero anyway
    are pruned in any case.

    The first group has the weights that did not reach their guards; it may be empty. Each other weight has a group of
    its own.

    Raises:
        ValueError: a weight holds NaN or infinity (on other devices than a CPU the threshold is NaN instead).

    Source: the global threshold of Feather (https://arxiv.org/abs/2310.02448); the guards are ours.

    Example:
        >>> weights = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([4.0, 5.0, 6.0])}
        >>> for group in global_magnitude(weights, 4, {"a": 2}):
        ...     print(group.names, group.zeros, group.threshold)
        ('b',) 2 tensor(5.)
        ('a',) 2 tensor(2.)
    """
    parts, add_up = held_here(weights)
    guarded: list[Group] = []
    names = tuple(weights)
    while True:
        free = {name: parts[name] for name in names}
        threshold = kth_magnitude(free, zeros, add_up)
        over: dict[str, int] = {}
        if guards and not threshold.is_meta and threshold != 0:  # at 0, all pruned elements are zero anyway
            counts = count_pruned(free, threshold, zeros, add_up)
            above = [name for name in names if counts[name].zeros > guards.get(name, counts[name].zeros)]
            natural = count_pruned({name: parts[name] for name in above}, 0 * threshold, 0, add_up)
            limits = {name: max(guards[name], natural[name].zeros) for name in above}
            over = {name: limit for name, limit in limits.items() if counts[name].zeros > limit}
        for name, limit in over.items():
            zeros -= limit
            guarded.append(Group((name,), limit, kth_magnitude({name: parts[name]}, limit, add_up)))
        names = tuple(name for name in names if name not in over)
        if not over or not names:
            return [Group(names, zeros, threshold), *guarded]


def uniform(weights: Mapping[str, Tensor], zeros: int, guards: Mapping[str, int]) -> list[Group]:
    """Prune the same fraction of each weight: zeros in proportion to the sizes.

    ``zeros_i = rate * numel_i``

    Example:
        >>> weights = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([4.0, 5.0, 6.0])}
        >>> [group.zeros for group in uniform(weights, 4, {})]
        [2, 2]
    """
    return zeros_in_proportion(weights, zeros, guards, {name: weight.numel() for name, weight in weights.items()})


def erk(weights: Mapping[str, Tensor], zeros: int, guards: Mapping[str, int]) -> list[Group]:
    """Keep survivors in proportion to the sum of the dimensions of each weight (Erdős-Rényi-Kernel).

    ``survivors_i = c * sum(shape_i)``, which is ``c * (n_out + n_in + height + width)`` for a convolution. A weight
    that would get more survivors than it has elements is dense, and c is larger for the others.

    Source: RigL (https://arxiv.org/abs/1911.11134), after SET (https://arxiv.org/abs/1707.04780).

    Example:
        >>> weights = {"conv": torch.ones(8, 4, 3, 3), "fc": torch.ones(10, 8)}
        >>> {group.names[0]: group.zeros / weights[group.names[0]].numel() for group in erk(weights, 332, {})}
        {'conv': 0.9375, 'fc': 0.775}
    """
    return survivors_in_proportion(weights, zeros, guards, lambda name, weight: sum(weight.shape))


def square_root(weights: Mapping[str, Tensor], zeros: int, guards: Mapping[str, int]) -> list[Group]:
    """Keep survivors in proportion to the square root of the size of each weight.

    ``survivors_i = c * sqrt(numel_i)``. As in `erk`, a weight with more survivors than elements is dense.

    Example:
        >>> weights = {"a": torch.ones(4, 4), "b": torch.ones(8, 8)}
        >>> [group.zeros for group in square_root(weights, 68, {})]
        [12, 56]
    """
    return survivors_in_proportion(weights, zeros, guards, lambda name, weight: math.sqrt(weight.numel()))


def lamp(weights: Mapping[str, Tensor], zeros: int, guards: Mapping[str, int]) -> list[Group]:
    """Rank all elements together by the square over the sum of the squares in the same weight that are not smaller.

    ``score(w_u) = w_u^2 / sum of w_v^2 over the elements v of the weight with |w_v| >= |w_u|``. The largest element of
    each weight has the score 1. So no weight is pruned as a whole before all weights have one survivor.

    This sorts each weight, needs about 24 bytes of memory for each element, and waits for the device.

    Raises:
        ValueError: a weight holds NaN or infinity, or is sharded over processes.

    Source: Lee et al. 2021 (https://arxiv.org/abs/2010.07611).

    Example:
        >>> weights = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([40.0, 50.0, 60.0])}
        >>> [group.zeros for group in lamp(weights, 3, {})]
        [2, 1]
    """
    for name, weight in weights.items():
        if is_sharded(weight):
            raise ValueError(
                f"expected whole weights, got {printable(name)} sharded over processes: lamp sorts each weight; use "
                "DDP, or another allocation, for example allocations.normalised"
            )
    if _scores_are_needless(weights, zeros):
        return global_magnitude(weights, zeros, guards)
    return _ranked(weights, {name: lamp_scores(weight) for name, weight in weights.items()}, zeros, guards)


def normalised(weights: Mapping[str, Tensor], zeros: int, guards: Mapping[str, int]) -> list[Group]:
    """Rank all elements together by the magnitude over the standard deviation of the weight.

    ``score(w) = |w| / sigma_i`` with ``sigma_i^2 = mean of w^2`` over the weight: the standard deviation about zero,
    with four significant digits. (Sums over processes then give the same number as sums in one process.)

    This waits for the device.

    Raises:
        ValueError: a weight holds NaN or infinity.

    Source: ST-3-sigma (https://arxiv.org/abs/2212.01076). Its code takes ``1 / sqrt(sum(shape))`` for sigma, about the
    standard deviation of the initialisation. Here it is measured.

    Example:
        >>> weights = {"a": torch.tensor([0.1, 0.2, 0.3]), "b": torch.tensor([4.0, 5.0, 6.0])}
        >>> [group.zeros for group in normalised(weights, 2, {})]
        [1, 1]
    """
    spreads = {} if _scores_are_needless(weights, zeros) else deviations(weights)
    if not spreads or not all(map(math.isfinite, spreads.values())):
        return global_magnitude(weights, zeros, guards)  # without values, or it finds NaN and infinity
    largest = max(spreads.values())  # factors of at least 1: no magnitude becomes zero
    factors = {name: largest / spread if spread else 1.0 for name, spread in spreads.items()}
    scores = {name: as_threshold(weight.detach().abs()) * factors[name] for name, weight in weights.items()}
    return _ranked(weights, scores, zeros, guards)


def in_proportion(number: Callable[[str, Tensor], float]) -> Allocation:
    """Return an allocation that keeps survivors in proportion to a number for each weight.

    ``survivors_i = c * number(name_i, weight_i)``. A weight that would get more survivors than it has elements is
    dense, and c is larger for the others.

    Args:
        number: function of the name and the weight, which returns a finite number > 0. It should depend on the name and
            the shape only: a number that depends on the values waits for the device, and the weight may be sharded over
            processes or on the meta device.

    Raises:
        TypeError: `number` is not callable. The allocation raises it if the function returns no number.
        ValueError: raised by the allocation if the number is not > 0 and finite.

    Example:
        >>> outputs = in_proportion(lambda name, weight: weight.shape[0])  # survivors of an output
        >>> [group.zeros for group in outputs({"a": torch.ones(4, 4), "b": torch.ones(8, 8)}, 68, {})]
        [12, 56]
    """
    if not callable(number):
        raise TypeError(f"expected a function (name, weight) -> number, got {type(number).__name__}")
    if not takes(number, 2):
        raise TypeError(f"expected a function (name, weight) -> number, got {name_of(number)} with other arguments")

    def allocation(weights: Mapping[str, Tensor], zeros: int, guards: Mapping[str, int]) -> list[Group]:
        return survivors_in_proportion(weights, zeros, guards, number)

    return _named(allocation, f"in_proportion({name_of(number)})")


def per_layer(rates: Mapping[str, float]) -> Allocation:
    """Return an allocation with a rate for each weight: zeros in proportion to rate and size.

    ``zeros_i = c * rate_i * numel_i``, so that all zeros together are those of ``final_rate`` and of the schedule. The
    rates are relative: c is 1 at the end if they give ``final_rate`` together. A weight with the rate 0 is dense.

    Args:
        rates: maps globs on names to rates in [0, 1). A glob matches the name of a weight or of its module. The first
            glob that matches a weight determines its rate.

    Raises:
        TypeError: `rates` is no mapping, a glob is no string, or a rate is no number.
        ValueError: there are no rates, or a rate is not in [0, 1). The allocation raises it if a glob determines no
            weight, no glob matches a weight, or the weights with a rate above 0 have too few elements.

    Example:
        >>> weights = {"first.weight": torch.ones(4, 5), "last.weight": torch.ones(4, 5)}
        >>> [group.zeros for group in per_layer({"first": 0.4, "*": 0.8})(weights, 24, {})]
        [8, 16]
    """
    checked = checked_rates(rates)
    globs = Globs(checked)

    def allocation(weights: Mapping[str, Tensor], zeros: int, guards: Mapping[str, int]) -> list[Group]:
        own = rates_by_name(checked, weights, globs)
        numbers = {name: own[name] * weight.numel() for name, weight in weights.items()}
        return zeros_in_proportion(weights, zeros, guards, numbers)

    return _named(allocation, f"per_layer({checked})")


def from_plan(plan: Any) -> Allocation:
    """Return an allocation with the zeros that a report, a plan or a mapping lists.

    ``zeros_i = c * listed_i`` while there are fewer zeros than are listed; if there are more,
    ``survivors_i = c * (numel_i - listed_i)``. If ``final_rate`` gives as many zeros as are listed, each weight has the
    listed zeros at the end. A weight for which no zeros are listed is dense.

    Args:
        plan: a `Report`, a `Plan`, or a mapping from the name of a weight to its number of zeros.

    Raises:
        TypeError: it is something else, or a number of zeros is no int.
        ValueError: the plan has no zeros for each weight. The allocation raises it if the names are not those of the
            weights, or more zeros are needed than the weights with listed zeros have elements.

    Example:
        >>> weights = {"a": torch.ones(4, 4), "b": torch.ones(8, 8)}
        >>> [group.zeros for group in from_plan({"a": 10, "b": 50})(weights, 30, {})]
        [5, 25]
    """
    listed = listed_zeros(plan)

    def allocation(weights: Mapping[str, Tensor], zeros: int, guards: Mapping[str, int]) -> list[Group]:
        if wrong := sorted(listed.keys() ^ weights.keys()):
            where = "weights of the model" if wrong[0] in listed else "plan"
            raise ValueError(
                f"expected the plan to list the zeros of each weight of this model, got {printable(wrong[0])}, which "
                f"is not in the {where}; make the plan with the same include and exclude"
            )
        return zeros_as_listed(weights, zeros, guards, listed)

    checksum = zlib.crc32(repr(sorted(listed.items())).encode())
    return _named(allocation, f"from_plan({len(listed)} weights, {sum(listed.values())} zeros, {checksum:08x})")


def _scores_are_needless(weights: Mapping[str, Tensor], zeros: int) -> bool:
    """Return whether scores of the weights would change nothing, or cannot be computed."""
    return not zeros or any(weight.is_meta for weight in weights.values())


def _ranked(
    weights: Mapping[str, Tensor], scores: Mapping[str, Tensor], zeros: int, guards: Mapping[str, int]
) -> list[Group]:
    """Give each weight the zeros that the smallest of all scores give it.

    In each weight, larger magnitudes must have larger scores, and 0 the score 0. The score of NaN is NaN.
    """
    ranked = global_magnitude(scores, zeros, guards)
    if any(math.isnan(group.threshold) for group in ranked):  # not on a CPU: there it has raised
        return global_magnitude(weights, zeros, guards)  # its threshold is NaN, as that of any other allocation
    counts = count_zeros(scores, ranked)
    given: dict[str, int] = {}
    for name in weights:  # more elements than `zeros` may have the score 0
        given[name] = min(counts[name].zeros, zeros)
        zeros -= given[name]
    return group_each(weights, given)


def _named(allocation: Allocation, name: str) -> Allocation:
    """Give an allocation the name that a saved state shows."""
    allocation.__name__ = name  # type: ignore[attr-defined]
    return allocation

"""In which order several factors are multiplied: by opt_einsum, with costs that know the samples of a vmap."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import opt_einsum

from chainrule.maps.terms import Axis, Factor


def contraction_order(factors: list[Factor], keep: Sequence[Axis]) -> list[tuple[int, int]]:
    """The pairs to multiply, one after the other: their places among the factors, of which each product becomes the last."""
    names: dict[Axis, int] = {}
    inputs = tuple(tuple(names.setdefault(axis, len(names)) for axis in factor.axes) for factor in factors)
    output = tuple(names[axis] for axis in keep if axis in names)
    sizes = tuple(axis.size for axis in names)
    if len(factors) > 2 and (batch := max(factor.node.batch for factor in factors)) > 1:
        # The samples of a surrounding vmap are one more axis of the factors that differ between them.
        samples = (len(sizes),)
        inputs = tuple(i + samples if f.node.batch > 1 else i for i, f in zip(inputs, factors, strict=True))
        output, sizes = output + samples, (*sizes, batch)
    return _cached_path(inputs, output, sizes)


@lru_cache(maxsize=4096)
def _cached_path(
    inputs: tuple[tuple[int, ...], ...], output: tuple[int, ...], sizes: tuple[int, ...]
) -> list[tuple[int, int]]:
    if len(inputs) == 2:
        return [(0, 1)]
    size_of = dict(enumerate(sizes))
    sets = [frozenset(axes) for axes in inputs]
    # Exhaustive, outer products included, for a few factors; beyond that what opt_einsum chooses by their number.
    # (Its "optimal" counts a product that it met before with the flops of that first time: not always the optimum.)
    few = len(inputs) <= 8
    optimizer = opt_einsum.DynamicProgramming(minimize="flops", search_outer=True) if few else opt_einsum.paths.auto
    path = optimizer(sets, frozenset(output), size_of, None)
    # The operands as opt_einsum counts them, where a sum over axes of one operand alone moves it to the end, and as they are.
    theirs, ours = [[*range(len(inputs))] for _ in range(2)]
    steps: list[tuple[int, int]] = []
    fresh = itertools.count(len(inputs))
    for step in path:
        taken = [theirs[position] for position in sorted(step)]
        theirs = [operand for operand in theirs if operand not in taken]
        total = taken[0]
        for operand in taken[1:]:  # a step of several operands goes from left to right
            left, right = sorted((ours.index(total), ours.index(operand)))
            steps.append((left, right))
            total = next(fresh)
            ours = [*ours[:left], *ours[left + 1 : right], *ours[right + 1 :], total]
        theirs.append(total)
    return steps


__all__ = ["contraction_order"]

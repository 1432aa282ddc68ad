"""Contraction of factors: the order from opt_einsum, each pair as a node."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from chainrule.maps import running_products as running
from chainrule.maps.contraction_order import contraction_order
from chainrule.maps.masked_products import outer_product, sum_over, summed_product
from chainrule.maps.nodes import Node
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor
from chainrule.maps.views import permute


def contract(factors: Sequence[Factor], keep: Sequence[Axis], memo: dict[object, Node]) -> Factor:
    """Multiply ``factors``, sum every axis that is not in ``keep``, and return one factor over the kept carried axes.

    Args:
        factors: at least one factor.
        keep: the axes that survive; the result has those of them that some factor carries, in this order.
        memo: nodes already made in this plan, so that equal contractions are one node.
    """
    result = contract_any(factors, keep, memo)
    carried = set(result.axes)
    return transpose_to(result, [axis for axis in keep if axis in carried], memo)


def contract_any(factors: Sequence[Factor], keep: Sequence[Axis], memo: dict[object, Node]) -> Factor:
    """As :func:`contract`, with the axes in whatever order the last step gives them."""
    operands = _without_squares(factors)
    kept = set(keep)
    if len(operands) > 2:
        for left, right in contraction_order(operands, keep):
            second = operands.pop(right)
            first = operands.pop(left)
            still = kept.union(axis for factor in operands for axis in factor.axes)
            operands.append(_pair(first, second, still, memo, keep))
    if len(operands) == 2:
        operands = [_pair(operands[0], operands[1], kept, memo, keep)]
    return _sum_axes(operands[0], kept, memo)


def _without_squares(factors: Sequence[Factor]) -> list[Factor]:
    """The factors, those that are their own square once."""
    if not any(factor.node.is_indicator for factor in factors):
        return list(factors)
    found: dict[object, Factor] = {}
    for number, factor in enumerate(factors):
        found.setdefault((id(factor.node), factor.axes) if factor.node.is_indicator else number, factor)
    return list(found.values())


def _sum_axes(factor: Factor, kept: set[Axis], memo: dict[object, Node]) -> Factor:
    gone = tuple(i for i, axis in enumerate(factor.axes) if axis not in kept)
    if not gone:
        return factor
    axes = tuple(axis for axis in factor.axes if axis in kept)
    key = ("sum", id(factor.node), gone)
    node = memo.get(key)
    if node is None and (known := factor.node.sums) is not None:
        rest = Factor(known(gone[0]), (*factor.axes[: gone[0]], *factor.axes[gone[0] + 1 :]))
        node = memo[key] = _sum_axes(rest, kept, memo).node
    if node is None and factor.node.running is not None:
        for i in gone:
            if (found := running.summed(factor, factor.axes[i], memo)) is not None:
                rest = transpose_to(found, [axis for axis in factor.axes if axis in found.axes], memo)
                node = memo[key] = _sum_axes(rest, kept, memo).node
                break
    if node is None and all(factor.axes[i].size == 1 for i in gone):
        node = memo[key] = Node(
            (axis.size for axis in axes), (factor.node,),
            lambda program, value: program.view_of(value, lambda v: torch.squeeze(v, gone)), label="squeeze",
        )  # fmt: skip
    if node is None:
        node = memo[key] = Node(
            (axis.size for axis in axes),
            (factor.node,),
            lambda program, value: sum_over(program, value, gone),
            flops=factor.node.numel,
            moved=factor.node.numel,
            label="sum",
        )
    return Factor(node, axes)


def transpose_to(factor: Factor, order: Sequence[Axis], memo: dict[object, Node]) -> Factor:
    """Permute a factor's axes (a view)."""
    axes = tuple(order)
    if axes == factor.axes:
        return factor
    permutation = tuple(factor.axes.index(axis) for axis in axes)
    key = ("permute", id(factor.node), permutation)
    node = memo.get(key)
    if node is None:
        node = memo[key] = Node(
            (axis.size for axis in axes), (factor.node,),
            lambda program, value: program.view_of(value, lambda v: permute(v, permutation)), label="permute",
        )  # fmt: skip
        if factor.node.running is not None:
            node.running = factor.node.running.placed(permutation)
    return Factor(node, axes)


def _pair(
    first: Factor, second: Factor, still: set[Axis], memo: dict[object, Node], wanted: Sequence[Axis]
) -> Factor:
    """Contract two factors; axes outside ``still`` are summed. ``wanted`` is the order of the final result."""
    if first.node.running is not None or second.node.running is not None:
        found = _running_product(first, second, still, memo, wanted)
        if found is not None:
            return found
    return _plain_pair(first, second, still, memo, wanted)


def _running_product(
    first: Factor, second: Factor, still: set[Axis], memo: dict[object, Node], wanted: Sequence[Axis]
) -> Factor | None:
    """A product with matrices that are made by recurrences: summed by these, or of their kind itself and then summed."""
    for one, two in ((first, second), (second, first)):
        if (found := _merged(one, two, still, memo) or running.summed_product(one, two, still, memo)) is not None:
            return _sum_axes(found, still, memo)
    middle = running.middle(first, second)
    every = {*first.axes, *second.axes} if middle is None else {*first.axes, *second.axes} - ({middle} - still)
    if every <= still:
        return None
    found = _plain_pair(first, second, still | every, memo, wanted)
    if found.node.running is None:
        read = running.read_product(first, second, still, memo)
        return read if read is None else _sum_axes(read, still, memo)
    return _sum_axes(found, still, memo)


def _plain_pair(
    first: Factor, second: Factor, still: set[Axis], memo: dict[object, Node], wanted: Sequence[Axis]
) -> Factor:
    merged = _merged(first, second, still, memo) or _merged(second, first, still, memo)
    if merged is not None:
        return merged
    # An axis that only one of them carries and nobody needs is summed before the product.
    both = set(first.axes) & set(second.axes)
    first = _sum_axes(first, still | both, memo)
    second = _sum_axes(second, still | both, memo)
    summed = [axis for axis in first.axes if axis in both and axis not in still]
    if summed and _stands_before(second, first, both, wanted):
        first, second = second, first
    names: dict[Axis, int] = {}
    left = tuple(names.setdefault(axis, len(names)) for axis in first.axes)
    right = tuple(names.setdefault(axis, len(names)) for axis in second.axes)
    gone = tuple(names[axis] for axis in summed)
    key = ("pair", id(first.node), left, id(second.node), right, gone)
    batch = [axis for axis in first.axes if axis in both and axis in still]
    left_only = [axis for axis in first.axes if axis not in both]
    right_only = [axis for axis in second.axes if axis not in both]
    if summed:
        axes = tuple(batch + left_only + right_only)
    else:
        axes = _product_order(first, second, wanted)
    key = (*key, tuple(names[axis] for axis in axes))
    node = memo.get(key)
    if node is None:
        groups = (
            tuple(names[a] for a in batch),
            tuple(names[a] for a in left_only),
            tuple(names[a] for a in right_only),
            gone,
        )
        order = tuple(names[a] for a in axes)
        sizes = {names[a]: a.size for a in names}
        flops = math.prod(sizes.values())
        moved = first.node.numel + second.node.numel + math.prod(a.size for a in axes)

        def compute(program: Program, x: Staged, y: Staged) -> Staged:
            if not gone:
                return outer_product(program, x, left, y, right, order)
            return summed_product(program, x, left, y, right, groups, sizes)

        node = memo[key] = Node(
            (a.size for a in axes), (first.node, second.node), compute, flops=flops, moved=moved, label="product"
        )
        node.running = running.of_product(first, second, axes, summed)
    return Factor(node, axes)


class Merge(NamedTuple):
    """A product that is computed without one of its factors.

    What a node's ``merge`` attribute, called with the factor, the other factor and the axes that survive, returns.

    Attributes:
        axes: the axes of the result.
        compute: makes it from the value of the other factor.
        moved: elements read and written.
    """

    axes: tuple[Axis, ...]
    compute: Callable[[Program, Staged], Staged]
    moved: int


def _merged(first: Factor, second: Factor, still: set[Axis], memo: dict[object, Node]) -> Factor | None:
    """The contraction of two factors by a way of the first one's own, if it has one for this."""
    if first.node.merge is None or second.node.running is not None:
        return None
    second = _sum_axes(second, still | set(first.axes), memo)
    found: Merge | None = first.node.merge(first, second, still)
    if found is None:
        return None
    names: dict[Axis, int] = {}
    places = (tuple(names.setdefault(a, len(names)) for a in axes) for axes in (first.axes, second.axes, found.axes))
    key = ("merge", id(first.node), id(second.node), *places)
    node = memo.get(key)
    if node is None:
        flops = math.prod(axis.size for axis in names)
        sizes = (axis.size for axis in found.axes)
        batch = first.node.batch
        node = memo[key] = Node(
            sizes, (second.node,), found.compute, flops=flops, moved=found.moved, label="product", batch=batch
        )
    return Factor(node, found.axes)


def _stands_before(one: Factor, two: Factor, both: set[Axis], wanted: Sequence[Axis]) -> bool:
    """Whether the first free axis of ``one`` comes before that of ``two`` in the order that the reader wants."""
    places = {axis: place for place, axis in enumerate(wanted)}
    firsts = [next((places[a] for a in f.axes if a not in both and a in places), None) for f in (one, two)]
    return None not in firsts and firsts[0] < firsts[1]  # type: ignore[operator]


def _product_order(first: Factor, second: Factor, wanted: Sequence[Axis]) -> tuple[Axis, ...]:
    """The axis order of an element-wise product.

    That of the larger operand, so that it is not permuted; but a product larger than both is laid out as its reader wants it.
    Where the reader sums some of its axes, each axis that is new to the larger operand stands among the others as the reader has
    it: a matrix product of them is then copied into a result in longer runs.
    """
    big, small = (first, second) if len(first.axes) >= len(second.axes) else (second, first)
    extra = [axis for axis in small.axes if axis not in big.axes]
    places = {axis: place for place, axis in enumerate(wanted)}
    if extra and places.keys() >= {*extra, *big.axes}:
        return tuple(sorted((*extra, *big.axes), key=places.__getitem__))
    placed = [axis for axis in extra if axis in places and axis.size > 1]
    order = [*(axis for axis in extra if axis not in placed), *big.axes]
    for axis in sorted(placed, key=places.__getitem__):
        known = [(number, places[other] > places[axis]) for number, other in enumerate(order) if other in places]
        later = next((number for number, after in known if after), None)
        order.insert(later if later is not None else known[-1][0] + 1 if known else 0, axis)
    return tuple(order)


__all__ = ["Merge", "contract", "contract_any", "transpose_to"]

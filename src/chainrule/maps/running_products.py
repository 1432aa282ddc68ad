"""Products and sums of arrays that hold semiseparable matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from chainrule.maps.nodes import Node
from chainrule.maps.running import Running, alike, applied, composed, entries_of, in_order, of_both, some_array, stacked, weighted
from chainrule.maps.staging import Staged
from chainrule.maps.terms import Axis, Factor

#: Matrices are noted beside a product that holds at least this many times the numbers that stand for them.
_FEW = 4


def of_product(first: Factor, second: Factor, axes: Sequence[Axis], summed: Sequence[Axis]) -> Running | None:
    """The matrices that the product of two factors holds, summed over axes of both; None where it holds none."""
    one, two = first.node.running, second.node.running
    if one is None and two is None:
        return None
    if one is not None and two is not None:
        return _of_two(first, one, second, two, axes, summed)
    if one is None:
        first, second, one = second, first, two
    assert one is not None
    row, column = first.axes[one.row], first.axes[one.column]
    if summed or (row in second.axes and column in second.axes):
        return None
    stack = [axis for axis in axes if axis is not row and axis is not column]
    if math.prod(axis.size for axis in stack) * max(row.size, column.size) * _FEW > math.prod(axis.size for axis in axes):
        return None
    found = stacked(first, one, stack)
    side = next((number for number, axis in enumerate((row, column)) if axis in second.axes), 0)
    last = (row, column)[side] if (row, column)[side] in second.axes else None
    found = weighted(found, _vector(second, stack, last), side)
    return replace(found, row=axes.index(row), column=axes.index(column))


def _vector(factor: Factor, stack: Sequence[Axis], last: Axis | None) -> Node:
    """A factor over (some of) a stack and one axis as an array of shape ``(*stack, size of last)``."""
    wanted = (*stack, *(() if last is None else (last,)))
    order = tuple(sorted(range(len(factor.axes)), key=lambda d: wanted.index(factor.axes[d])))
    shape = tuple(axis.size if axis in factor.axes else 1 for axis in wanted) + (() if last is not None else (1,))
    node = factor.node
    if shape == node.sizes:
        return node

    def view(value: Staged) -> Staged:
        value = value if order == tuple(range(len(order))) else torch.permute(value, order)
        return torch.reshape(value, shape)

    return Node(shape, (node,), lambda program, value: program.view_of(value, view), label="view")


def middle(first: Factor, second: Factor) -> Axis | None:
    """The axis along which two factors of matrices would be multiplied as matrices; None where there is not one."""
    one, two = first.node.running, second.node.running
    if one is None or two is None:
        return None
    shared = {first.axes[one.row], first.axes[one.column]} & {second.axes[two.row], second.axes[two.column]}
    return next(iter(shared)) if len(shared) == 1 else None


def _of_two(
    first: Factor, one: Running, second: Factor, two: Running, axes: Sequence[Axis], summed: Sequence[Axis]
) -> Running | None:
    ends = {first.axes[one.row], first.axes[one.column]}
    others = {second.axes[two.row], second.axes[two.column]}
    shared = ends & others
    if len(ends) < 2 or len(others) < 2:
        return None
    if shared == ends and not summed:
        if first.axes[one.row] is not second.axes[two.row]:
            two = two.transpose()
        row, column = first.axes[one.row], first.axes[one.column]
        stack = [axis for axis in axes if axis not in ends]
        left, right = alike(stacked(first, one, stack), stacked(second, two, stack))
        if left is None or right is None:
            return None
        matrix = left.matrix.elementwise(right.matrix)
        rows, columns = (of_both(a, b) for a, b in ((left.rows, right.rows), (left.columns, right.columns)))
    elif len(shared) == 1 and list(summed) == list(shared) and not any(
        axis in factor.axes for factor, far in ((first, others - shared), (second, ends - shared)) for axis in far
    ):
        (middle,) = shared
        one = one if first.axes[one.column] is middle else one.transpose()
        two = two if second.axes[two.row] is middle else two.transpose()
        row, column = first.axes[one.row], second.axes[two.column]
        stack = [axis for axis in axes if axis is not row and axis is not column]
        made = composed(stacked(first, one, stack), stacked(second, two, stack))
        if made is None:
            return None
        matrix, rows, columns = made
    else:
        return None
    if matrix is None:
        return None
    dtype = torch.promote_types(one.dtype, two.dtype)
    return in_order(Running(axes.index(row), axes.index(column), matrix, rows, columns, dtype))


def read_product(first: Factor, second: Factor, still: set[Axis], memo: dict[object, Node]) -> Factor | None:
    """The product of two factors with the same two axes of their matrices, summed over one of them.

    It is the diagonal of a product of matrices, whatever rows of it are read. None where there is no such sum.
    """
    one, two = first.node.running, second.node.running
    if one is None or two is None:
        return None
    ends = {first.axes[one.row], first.axes[one.column]}
    if len(ends) < 2 or ends != {second.axes[two.row], second.axes[two.column]}:
        return None
    stack = list(dict.fromkeys(axis for axis in (*first.axes, *second.axes) if axis not in ends))
    for middle in ends - still:
        left = one if first.axes[one.column] is middle else one.transpose()
        right = two if second.axes[two.row] is middle else two.transpose()
        (kept,) = ends - {middle}
        made = composed(stacked(first, left, stack), stacked(second, right, stack))
        if made is None or made[0] is None:
            continue
        axes = (*stack, kept)
        names: dict[Axis, int] = {}
        places = (tuple(names.setdefault(a, len(names)) for a in part) for part in (first.axes, second.axes, axes))
        key = ("running diagonal", id(first.node), id(second.node), *places)
        node = memo.get(key)
        if node is None:
            matrix, rows, columns = made
            dtype = torch.promote_types(one.dtype, two.dtype)
            found = in_order(Running(len(stack), len(stack) + 1, matrix, rows, columns, dtype))
            node = memo[key] = entries_of(found, None, None, tuple(axis.size for axis in stack), kept.size)
        return Factor(node, axes)
    return None


def summed_product(first: Factor, second: Factor, still: set[Axis], memo: dict[object, Node]) -> Factor | None:
    """The product of matrices with an array that is summed over one of their sides, by recurrence; None for other products."""
    one = first.node.running
    if one is None or first.axes[one.row] is first.axes[one.column]:
        return None
    if second.axes and not set(second.axes).isdisjoint(first.axes):
        for running in (one, one.transpose()):
            row, column = first.axes[running.row], first.axes[running.column]
            if column in still or column not in second.axes or row in second.axes:
                continue
            two = second.node.running
            if two is not None and column in (second.axes[two.row], second.axes[two.column]):
                continue
            return _summed(first, running, second, memo)
    return None


def summed(factor: Factor, gone: Axis, memo: dict[object, Node]) -> Factor | None:
    """A factor summed over one side of the matrices that it holds; None where it holds none there."""
    running = factor.node.running
    if running is None or factor.axes[running.row] is factor.axes[running.column]:
        return None
    for found in (running, running.transpose()):
        if factor.axes[found.column] is gone:
            return _summed(factor, found, None, memo)
    return None


def _summed(first: Factor, running: Running, second: Factor | None, memo: dict[object, Node]) -> Factor:
    row, column = first.axes[running.row], first.axes[running.column]
    stack = [axis for axis in first.axes if axis is not row and axis is not column]
    rest = [] if second is None else [axis for axis in second.axes if axis is not column and axis not in stack]
    axes = (*stack, row, *rest)
    names = None if second is None else tuple(first.axes.index(a) if a in first.axes else -1 for a in second.axes)
    key = ("running product", id(first.node), running.row, second and id(second.node), names)
    node = memo.get(key)
    if node is None:
        found = stacked(first, running, stack)
        if second is None:
            vectors = _ones(found, column.size)
        else:
            flat = tuple(axis.size if axis in second.axes else 1 for axis in stack)
            shape = (*flat, column.size, math.prod(axis.size for axis in rest))
            wanted = [*stack, column, *rest]
            order = tuple(sorted(range(len(second.axes)), key=lambda d: wanted.index(second.axes[d])))
            vectors = Node(
                shape, (second.node,), lambda p, v: torch.reshape(torch.permute(v, order), shape), label="view",
            )  # fmt: skip
        result = applied(found, vectors)
        sizes = tuple(axis.size for axis in axes)
        whole = (*(axis.size for axis in stack), *result.sizes[-2:])
        node = memo[key] = Node(
            sizes, (result,), lambda p, v: torch.reshape(torch.broadcast_to(v, whole), sizes), label="view"
        )
    return Factor(node, axes)


def _ones(found: Running, count: int) -> Node:
    beside = some_array(found.matrix)
    sizes = (*(1,) * found.row, count, 1)
    return Node(
        sizes, (beside,), lambda p, v: p.call(torch.ones, sizes, dtype=v.dtype, device=v.device), label="ones"
    )  # fmt: skip


def of_sum(first: Factor, second: Factor) -> Running | None:
    """The matrices that a sum of two arrays over the same axes holds; None where it holds none."""
    one, two = first.node.running, second.node.running
    if one is None or two is None or first.axes != second.axes or {one.row, one.column} != {two.row, two.column}:
        return None
    two = two if two.row == one.row else two.transpose()
    left, right = alike(one, two)
    if left is None or right is None:
        return None
    for a, b in ((left.rows, right.rows), (left.columns, right.columns)):
        if (a and a.weights) is not (b and b.weights):
            return None
    matrix = left.matrix.plus(right.matrix)
    return None if matrix is None else replace(left, matrix=matrix)


__all__ = ["middle", "of_product", "of_sum", "read_product", "summed", "summed_product"]

"""Arrays that hold semiseparable matrices, or some of their rows and columns.

A running sum's triangle is an array like any other to the planner, with its matrix (:mod:`chainrule.maps.semiseparable`) noted
beside it. Results of which the matrix is known (:mod:`chainrule.maps.running_products`, :mod:`chainrule.maps.running_reads`) are
noted with theirs; the array itself is only made where a result is that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from chainrule.maps.halves import product, zeros_beside
from chainrule.maps.nodes import Node
from chainrule.maps.semiseparable import Semiseparable
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor


class Reading(NamedTuple):
    """Which rows or columns of a matrix an array holds.

    Attributes:
        index: their numbers.
        weights: what each of them is multiplied with, of shape ``(*batch, k)``; None for ones.
        affine: the start and the step of the numbers, where these are known.
    """

    index: Node
    weights: Node | None = None
    affine: tuple[int, int] | None = None

    def agrees(self, other: Reading | None) -> bool:
        """Whether another side holds the same rows."""
        return other is not None and other.index is self.index


@dataclass(frozen=True)
class Running:
    """The matrices that an array holds in two of its dimensions.

    Attributes:
        row: the dimension that counts rows.
        column: the one that counts columns; all others count matrices, in their order.
        matrix: the matrices.
        rows: which rows there are; None for all in order.
        columns: the same for columns.
    """

    row: int
    column: int
    matrix: Semiseparable
    rows: Reading | None = None
    columns: Reading | None = None
    dtype: torch.dtype = torch.float64

    def transpose(self) -> Running:
        """The transposed matrices: each dimension counts the other side."""
        return Running(self.column, self.row, self.matrix.transpose(), self.columns, self.rows, self.dtype)

    def multiplied(self, number: float) -> Running:
        """The matrices times a number."""
        return replace(self, matrix=self.matrix.multiplied(number))

    def placed(self, order: Sequence[int]) -> Running:
        """What an array holds whose dimensions are those of this one in another order."""
        rank = len(order)
        behind = [d for d in range(rank) if d not in (self.row, self.column)]
        batch = [behind.index(d) for d in order if d not in (self.row, self.column)]

        def change(node: Node, last: int) -> Node:
            permutation = (*batch, *range(len(batch), len(batch) + last))
            if permutation == tuple(range(len(permutation))):
                return node
            sizes = tuple(node.sizes[d] for d in permutation)
            return Node(sizes, (node,), lambda p, v: p.view_of(v, lambda x: torch.permute(x, permutation)), label="permute")

        return self._changed(change, order.index(self.row), order.index(self.column))

    def _changed(self, change: Any, row: int, column: int) -> Running:
        def side(reading: Reading | None) -> Reading | None:
            if reading is None or reading.weights is None:
                return reading
            return reading._replace(weights=change(reading.weights, 1))

        return Running(row, column, self.matrix.restacked(change), side(self.rows), side(self.columns), self.dtype)


def stacked(factor: Factor, running: Running, axes: Sequence[Axis]) -> Running:
    """The matrices of a factor in a stack that is counted by `axes`, in this order, with their two dimensions behind it."""
    own = [axis for d, axis in enumerate(factor.axes) if d not in (running.row, running.column)]
    order = sorted(range(len(own)), key=lambda d: axes.index(own[d]))
    present = set(own)

    def change(node: Node, last: int) -> Node:
        sizes, behind = node.sizes, len(own)
        ordered = iter([sizes[d] for d in order])
        shape = (*(next(ordered) if axis in present else 1 for axis in axes), *sizes[behind:])
        permutation = (*order, *range(behind, behind + last))
        if shape == sizes and permutation == tuple(range(len(sizes))):
            return node

        def view(value: Staged) -> Staged:
            value = value if permutation == tuple(range(len(sizes))) else torch.permute(value, permutation)
            return torch.reshape(value, shape)

        return Node(shape, (node,), lambda program, value: program.view_of(value, view), label="view")

    return running._changed(change, len(axes), len(axes) + 1)


def weighted(found: Running, weights: Node, side: int) -> Running:
    """The matrices with their rows or columns times numbers."""
    reading = (found.rows, found.columns)[side]
    if reading is None or weights.sizes[-1] == 1:
        return replace(found, matrix=found.matrix.scaled(weights, side))
    kept = weights if reading.weights is None else product(reading.weights, weights)
    reading = reading._replace(weights=kept)
    return replace(found, rows=reading) if side == 0 else replace(found, columns=reading)


def in_order(found: Running) -> Running:
    """Matrices that are read backwards on both sides as matrices of the same kind."""
    size, rows, columns = found.matrix.size, found.rows, found.columns
    if rows is None or columns is None or not (is_turn(rows, size) and is_turn(columns, size)):
        return found
    matrix = found.matrix.reversed()
    for side, reading in enumerate((rows, columns)):
        if reading.weights is not None:
            matrix = matrix.scaled(reading.weights, side)
    return replace(found, matrix=matrix, rows=None, columns=None)


def of_both(one: Reading | None, two: Reading | None) -> Reading | None:
    """Which rows a product holds of which both factors hold the same."""
    if one is None or two is None or two.weights is None:
        return one
    return two if one.weights is None else one._replace(weights=product(one.weights, two.weights))


def alike(one: Running, two: Running) -> tuple[Running | None, Running | None]:
    """Two stacks of matrices that hold the same rows and columns, written so; None if they do not."""

    def same(a: Reading | None, b: Reading | None) -> bool:
        return b is None if a is None else a.agrees(b)

    for left, right in ((one, two), (_turned(one), two), (one, _turned(two))):
        if left is None or right is None:
            continue
        if same(left.rows, right.rows) and same(left.columns, right.columns):
            return left, right
    return None, None


def is_turn(reading: Reading | None, size: int) -> bool:
    """Whether all rows are read, in the opposite order."""
    return reading is not None and reading.affine == (size - 1, -1) and reading.index.sizes == (size,)


def _turned(found: Running) -> Running | None:
    """The same matrices, of which one side is read backwards, with the other side read backwards; None where none is."""
    size = found.matrix.size
    turned = [is_turn(reading, size) for reading in (found.rows, found.columns)]
    if turned[0] == turned[1]:
        return None
    if turned[0]:
        reading, other = found.rows, found.columns
    else:
        reading, other = found.columns, found.rows
    if other is not None:
        return None
    assert reading is not None
    matrix = found.matrix.reversed()
    if reading.weights is not None:
        # They belong to the rows as the array holds them: those of the matrix that is turned around.
        matrix = matrix.scaled(reading.weights, 0 if turned[0] else 1)
    plain = reading._replace(weights=None)
    return replace(found, matrix=matrix, rows=None if turned[0] else plain, columns=plain if turned[0] else None)


def composed(one: Running, two: Running) -> tuple[Semiseparable | None, Reading | None, Reading | None] | None:
    """The product of two stacks of matrices."""
    for left, right in ((one, two), (_turned(one), two), (one, _turned(two))):
        if left is None or right is None:
            continue
        middle, other = left.columns, right.rows
        if middle is None and other is None:
            return left.matrix.times(right.matrix, None), left.rows, right.columns
        if middle is not None and middle.agrees(other):
            reading = of_both(middle, other)
            assert reading is not None
            weights = _spread(reading, left.matrix.size)
            return left.matrix.times(right.matrix, weights), left.rows, right.columns
    return None


def _spread(reading: Reading, size: int) -> Node:
    """How often each row is read, or with which weights, of shape ``(*batch, size)``."""
    count = reading.index.sizes[0]
    if reading.weights is None:

        def counted(program: Program, index: Staged) -> Staged:
            zeros = program.call(torch.zeros, (size,), dtype=torch.float64, device=index.device)
            ones = program.call(torch.ones, (count,), dtype=torch.float64, device=index.device)
            return torch.index_add(zeros, 0, index, ones)

        return Node((size,), (reading.index,), counted, moved=2 * size, label="counts")
    return _scattered(reading.weights, reading.index, size, -1)


def _scattered(values: Node, index: Node, size: int, dim: int) -> Node:
    place = len(values.sizes) + dim
    sizes = (*values.sizes[:place], size, *values.sizes[place + 1 :])

    def compute(program: Program, value: Staged, places: Staged) -> Staged:
        zeros = program.call(torch.zeros, sizes, dtype=value.dtype, device=value.device)
        return torch.index_add(zeros, place, places, value)

    return Node(sizes, (values, index), compute, flops=values.numel, moved=2 * values.numel + math.prod(sizes), label="scatter")


def applied(found: Running, vectors: Node) -> Node:
    """The products of matrices (their dimensions last) with vectors of shape ``(*batch, k, m)``, at the rows that are held."""

    def times(value: Node, weights: Node | None) -> Node:
        if weights is None:
            return value
        shape = (*weights.sizes, 1)
        view = Node(shape, (weights,), lambda p, v: torch.reshape(v, shape), label="view")
        return product(value, view) or value

    if (columns := found.columns) is not None:
        vectors = _scattered(times(vectors, columns.weights), columns.index, found.matrix.size, -2)
    result = found.matrix.apply(vectors)
    if (rows := found.rows) is not None:
        sizes = (*result.sizes[:-2], rows.index.sizes[0], result.sizes[-1])
        node = Node(
            sizes, (result, rows.index), lambda p, v, i: torch.index_select(v, v.ndim - 2, i),
            flops=math.prod(sizes), moved=2 * math.prod(sizes), label="gather",
        )  # fmt: skip
        result = times(node, rows.weights)
    return _in_dtype(result, found.dtype)


def _in_dtype(node: Node, dtype: torch.dtype) -> Node:
    return Node(node.sizes, (node,), lambda p, v: v if v.dtype == dtype else v.to(dtype), label="dtype")


def some_array(matrix: Semiseparable) -> Node:
    """One of the arrays of matrices."""
    half = matrix.lower or matrix.upper
    node = matrix.diagonal if half is None else half.b
    assert node is not None
    return node


def entries_of(found: Running, row: Node | None, column: Node | None, others: tuple[int, ...], count: int) -> Node:
    """Entries side by side, at places of the array's two dimensions; None for all places in order."""
    beside = some_array(found.matrix)
    places, weights = [], []
    for reading, index in ((found.rows, row), (found.columns, column)):
        if reading is None:
            places.append(index)
            continue
        places.append(reading.index if index is None else selected(reading.index, index))
        if reading.weights is not None:
            weights.append(reading.weights if index is None else selected(reading.weights, index))
    rows, columns = places
    if rows is columns:
        result = found.matrix.diagonal
        if result is None:
            result = zeros_beside(beside, (*(1,) * len(others), found.matrix.size))
        result = result if rows is None else selected(result, rows)
    else:
        result = found.matrix.entries(rows, columns, beside)
    for weight in weights:
        result = product(result, weight) or result
    sizes = (*others, count)
    if result.sizes != sizes:
        result = _broadcast(result, sizes)
    return _in_dtype(result, found.dtype)


def _broadcast(node: Node, sizes: tuple[int, ...]) -> Node:
    return Node(sizes, (node,), lambda p, v: torch.broadcast_to(v, sizes), label="view")


def selected(node: Node, index: Node) -> Node:
    """An array read by an index along its last dimension."""
    sizes = (*node.sizes[:-1], index.sizes[0])
    numel = math.prod(sizes)
    return Node(
        sizes, (node, index), lambda p, v, i: torch.index_select(v, v.ndim - 1, i), flops=numel, moved=2 * numel, label="gather"
    )


def held(node: Node) -> int:
    """How many numbers stand for an array."""
    found = node.running
    if found is None:
        return node.numel
    halves = [half for half in (found.matrix.lower, found.matrix.upper) if half is not None]
    arrays = [found.matrix.diagonal, *(array for half in halves for array in half)]
    return min(node.numel, sum(array.numel for array in arrays if array is not None))


__all__ = [
    "Reading", "Running", "alike", "applied", "composed", "entries_of", "held", "in_order", "is_turn", "of_both", "selected",
    "some_array", "stacked", "weighted",
]  # fmt: skip

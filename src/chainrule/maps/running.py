"""Arrays that hold semiseparable matrices: what becomes of them where arrays are multiplied, summed, gathered and permuted.

A running sum's triangle is an array like any other to the planner, with its matrix (:mod:`chainrule.maps.semiseparable`) noted
beside it. Results of which the matrix is known, too, are noted with theirs; the array itself is only made where a result is that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from chainrule.maps.nodes import Node
from chainrule.maps.semiseparable import Semiseparable, product, zeros_beside
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, OneHot

#: Rows that are at most this share of all are made by the recurrence, not read off the whole array.
_FEW = 4


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


def _stacked(factor: Factor, running: Running, axes: Sequence[Axis]) -> Running:
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
    found = _stacked(first, one, stack)
    side = next((number for number, axis in enumerate((row, column)) if axis in second.axes), 0)
    last = (row, column)[side] if (row, column)[side] in second.axes else None
    found = _weighted(found, _vector(second, stack, last), side)
    return replace(found, row=axes.index(row), column=axes.index(column))


def _weighted(found: Running, weights: Node, side: int) -> Running:
    """The matrices with their rows or columns times numbers."""
    reading = (found.rows, found.columns)[side]
    if reading is None or weights.sizes[-1] == 1:
        return replace(found, matrix=found.matrix.scaled(weights, side))
    kept = weights if reading.weights is None else product(reading.weights, weights)
    reading = reading._replace(weights=kept)
    return replace(found, rows=reading) if side == 0 else replace(found, columns=reading)


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
        left, right = _alike(_stacked(first, one, stack), _stacked(second, two, stack))
        if left is None or right is None:
            return None
        matrix = left.matrix.elementwise(right.matrix)
        rows, columns = (_reading(a, b) for a, b in ((left.rows, right.rows), (left.columns, right.columns)))
    elif len(shared) == 1 and list(summed) == list(shared) and not any(
        axis in factor.axes for factor, far in ((first, others - shared), (second, ends - shared)) for axis in far
    ):
        (middle,) = shared
        one = one if first.axes[one.column] is middle else one.transpose()
        two = two if second.axes[two.row] is middle else two.transpose()
        row, column = first.axes[one.row], second.axes[two.column]
        stack = [axis for axis in axes if axis is not row and axis is not column]
        made = _composed(_stacked(first, one, stack), _stacked(second, two, stack))
        if made is None:
            return None
        matrix, rows, columns = made
    else:
        return None
    if matrix is None:
        return None
    return _normal(Running(axes.index(row), axes.index(column), matrix, rows, columns, torch.promote_types(one.dtype, two.dtype)))


def _normal(found: Running) -> Running:
    """Matrices that are read backwards on both sides as matrices of the same kind."""
    size, rows, columns = found.matrix.size, found.rows, found.columns
    if rows is None or columns is None or not (_is_turn(rows, size) and _is_turn(columns, size)):
        return found
    matrix = found.matrix.reversed()
    for side, reading in enumerate((rows, columns)):
        if reading.weights is not None:
            matrix = matrix.scaled(reading.weights, side)
    return replace(found, matrix=matrix, rows=None, columns=None)


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
        made = _composed(_stacked(first, left, stack), _stacked(second, right, stack))
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
            found = _normal(Running(len(stack), len(stack) + 1, matrix, rows, columns, dtype))
            node = memo[key] = _read(found, None, None, tuple(axis.size for axis in stack), kept.size)
        return Factor(node, axes)
    return None



def _reading(one: Reading | None, two: Reading | None) -> Reading | None:
    """Which rows a product holds of which both factors hold the same."""
    if one is None or two is None or two.weights is None:
        return one
    return two if one.weights is None else one._replace(weights=product(one.weights, two.weights))


def _alike(one: Running, two: Running) -> tuple[Running | None, Running | None]:
    """Two stacks of matrices that hold the same rows and columns, written so; None if they do not."""

    def same(a: Reading | None, b: Reading | None) -> bool:
        return b is None if a is None else a.agrees(b)

    for left, right in ((one, two), (_turned(one), two), (one, _turned(two))):
        if left is None or right is None:
            continue
        if same(left.rows, right.rows) and same(left.columns, right.columns):
            return left, right
    return None, None


def _is_turn(reading: Reading | None, size: int) -> bool:
    return reading is not None and reading.affine == (size - 1, -1) and reading.index.sizes == (size,)


def _turned(found: Running) -> Running | None:
    """The same matrices, of which one side is read backwards, with the other side read backwards; None where none is."""
    size = found.matrix.size
    turned = [_is_turn(reading, size) for reading in (found.rows, found.columns)]
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


def _composed(one: Running, two: Running) -> tuple[Semiseparable | None, Reading | None, Reading | None] | None:
    """The product of two stacks of matrices."""
    for left, right in ((one, two), (_turned(one), two), (one, _turned(two))):
        if left is None or right is None:
            continue
        middle, other = left.columns, right.rows
        if middle is None and other is None:
            return left.matrix.times(right.matrix, None), left.rows, right.columns
        if middle is not None and middle.agrees(other):
            reading = _reading(middle, other)
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


def _applied(found: Running, vectors: Node) -> Node:
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
        found = _stacked(first, running, stack)
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
        result = _applied(found, vectors)
        sizes = tuple(axis.size for axis in axes)
        whole = (*(axis.size for axis in stack), *result.sizes[-2:])
        node = memo[key] = Node(
            sizes, (result,), lambda p, v: torch.reshape(torch.broadcast_to(v, whole), sizes), label="view"
        )
    return Factor(node, axes)


def _ones(found: Running, count: int) -> Node:
    beside = _some(found.matrix)
    sizes = (*(1,) * found.row, count, 1)
    return Node(
        sizes, (beside,), lambda p, v: p.call(torch.ones, sizes, dtype=v.dtype, device=v.device), label="ones"
    )  # fmt: skip


def _some(matrix: Semiseparable) -> Node:
    """One of the arrays of matrices."""
    half = matrix.lower or matrix.upper
    node = matrix.diagonal if half is None else half.b
    assert node is not None
    return node


def diagonal(node: Node, first: int, second: int) -> Node | None:
    """The diagonals of the matrices that an array holds in two dimensions; None where it holds none there."""
    found = node.running
    if found is None or {first, second} != {found.row, found.column}:
        return None
    others = tuple(size for d, size in enumerate(node.sizes) if d not in (first, second))
    return _read(found, None, None, others, node.sizes[first])


def _read(found: Running, row: Node | None, column: Node | None, others: tuple[int, ...], count: int) -> Node:
    """Entries side by side, at places of the array's two dimensions; None for all places in order."""
    beside = _some(found.matrix)
    places, weights = [], []
    for reading, index in ((found.rows, row), (found.columns, column)):
        if reading is None:
            places.append(index)
            continue
        places.append(reading.index if index is None else _selected(reading.index, index))
        if reading.weights is not None:
            weights.append(reading.weights if index is None else _selected(reading.weights, index))
    rows, columns = places
    if rows is columns:
        result = found.matrix.diagonal
        if result is None:
            result = zeros_beside(beside, (*(1,) * len(others), found.matrix.size))
        result = result if rows is None else _selected(result, rows)
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


def _selected(node: Node, index: Node) -> Node:
    sizes = (*node.sizes[:-1], index.sizes[0])
    numel = math.prod(sizes)
    return Node(
        sizes, (node, index), lambda p, v, i: torch.index_select(v, v.ndim - 1, i), flops=numel, moved=2 * numel, label="gather"
    )


def gathered(factor: Factor, onehot: OneHot, memo: dict[object, Node]) -> Factor | None:
    """A factor read along one side of its matrices; None where the array has to be read itself.

    The factor that is returned is a part of the diagonal, or has the matrices noted whose rows are read.
    """
    running, target = factor.node.running, onehot.target
    if running is None or len(onehot.sources) != 1:
        return None
    if target is not factor.axes[running.row]:
        running = running.transpose()
    row, column, (source,) = factor.axes[running.row], factor.axes[running.column], onehot.sources
    if target is not row or row is column:
        return None
    if source is column:
        if onehot.partial:
            return None
        key = ("running entries", id(factor.node), running.row, id(onehot.index))
        node = memo.get(key)
        axes = (*(axis for axis in factor.axes if axis not in (row, column)), column)
        if node is None:
            others = tuple(axis.size for axis in axes[:-1])
            node = memo[key] = _read(running, onehot.index, None, others, column.size)
        return Factor(node, axes)
    return None


def note_gathered(factor: Factor, onehot: OneHot, node: Node, position: int, memo: dict[object, Node]) -> Node:
    """The node that reads a factor along one side of its matrices, with what it holds noted."""
    running = factor.node.running
    if running is None or len(onehot.sources) != 1 or position not in (running.row, running.column):
        return node
    key = ("running rows", id(node))
    if (known := memo.get(key)) is not None:
        return known
    turn = position != running.row
    found = running.transpose() if turn else running
    found = replace(found, rows=_read_again(found.rows, _reading_of(onehot, len(factor.axes) - 2, memo), found.matrix.size, memo))
    found = _normal(found)
    if _FEW * onehot.sources[0].size <= found.matrix.size:
        node = _rows_by_recurrence(found, node, position)
    node.running = found.transpose() if turn else found
    memo[key] = node
    return node


def _reading_of(onehot: OneHot, stack: int, memo: dict[object, Node]) -> Reading | None:
    """What a relation reads."""
    if not onehot.partial and onehot.affine == (0, 1) and onehot.sources[0].size == onehot.target.size:
        return None
    if not onehot.partial:
        return Reading(onehot.index, None, onehot.affine)
    index = onehot.index
    clamped = memo.get(("clamped", id(index)))
    if clamped is None:
        clamped = memo["clamped", id(index)] = Node(index.sizes, (index,), lambda p, v: torch.clamp(v, min=0), label="index")
    sizes = (*(1,) * stack, *index.sizes)

    def mask(program: Program, value: Staged) -> Staged:
        return torch.reshape((value >= 0).to(torch.float64), sizes)

    return Reading(clamped, Node(sizes, (index,), mask, label="mask"))


def _read_again(first: Reading | None, second: Reading | None, size: int, memo: dict[object, Node]) -> Reading | None:
    """Some of the rows that have been read."""
    if first is None or second is None:
        return first if second is None else second
    weights = second.weights
    if first.weights is not None:
        own = _selected(first.weights, second.index)
        weights = own if weights is None else product(own, weights)
    if weights is None and _is_turn(first, size) and _is_turn(second, size):
        return None
    key = ("index", id(first.index), id(second.index))
    index = memo.get(key)
    if index is None:
        index = memo[key] = _selected(first.index, second.index)
    return Reading(index, weights)


def _rows_by_recurrence(found: Running, node: Node, position: int) -> Node:
    """The rows that are read, as products of unit vectors with the transposed matrices."""
    sizes = node.sizes
    count, width = sizes[found.row], sizes[found.column]
    others = [size for d, size in enumerate(sizes) if d not in (found.row, found.column)]
    beside = _some(found.matrix)
    shape = (*(1,) * len(others), count, count)
    unit = Node(
        shape, (beside,),
        lambda p, v: torch.reshape(p.call(torch.eye, count, dtype=v.dtype, device=v.device), shape), label="unit vectors",
    )  # fmt: skip
    made = _applied(replace(found.transpose(), row=len(others), column=len(others) + 1), unit)
    order = [d for d in range(len(sizes)) if d not in (found.row, found.column)] + [found.column, found.row]
    back = tuple(order.index(d) for d in range(len(sizes)))
    whole = (*others, width, count)
    return Node(
        sizes, (made,), lambda p, v: torch.permute(torch.broadcast_to(v, whole), back), moved=2 * math.prod(sizes), label="rows"
    )


def of_sum(first: Factor, second: Factor) -> Running | None:
    """The matrices that a sum of two arrays over the same axes holds; None where it holds none."""
    one, two = first.node.running, second.node.running
    if one is None or two is None or first.axes != second.axes or {one.row, one.column} != {two.row, two.column}:
        return None
    two = two if two.row == one.row else two.transpose()
    left, right = _alike(one, two)
    if left is None or right is None:
        return None
    for a, b in ((left.rows, right.rows), (left.columns, right.columns)):
        if (a and a.weights) is not (b and b.weights):
            return None
    matrix = left.matrix.plus(right.matrix)
    return None if matrix is None else replace(left, matrix=matrix)


def held(node: Node) -> int:
    """How many numbers stand for an array."""
    found = node.running
    if found is None:
        return node.numel
    halves = [half for half in (found.matrix.lower, found.matrix.upper) if half is not None]
    arrays = [found.matrix.diagonal, *(array for half in halves for array in half)]
    return min(node.numel, sum(array.numel for array in arrays if array is not None))


__all__ = [
    "Reading", "Running", "diagonal", "gathered", "held", "middle", "note_gathered", "of_product", "of_sum", "read_product",
    "summed", "summed_product",
]  # fmt: skip

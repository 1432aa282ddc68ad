"""What is read of arrays that hold semiseparable matrices: diagonals, rows, single entries."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from chainrule.maps.halves import product
from chainrule.maps.nodes import Node
from chainrule.maps.running import Reading, Running, applied, entries_of, in_order, is_turn, selected, some_array
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Factor, OneHot

#: Rows that are at most this share of all are made by the recurrence, not read off the whole array.
_FEW = 4


def diagonal(node: Node, first: int, second: int) -> Node | None:
    """The diagonals of the matrices that an array holds in two dimensions; None where it holds none there."""
    found = node.running
    if found is None or {first, second} != {found.row, found.column}:
        return None
    others = tuple(size for d, size in enumerate(node.sizes) if d not in (first, second))
    return entries_of(found, None, None, others, node.sizes[first])


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
            node = memo[key] = entries_of(running, onehot.index, None, others, column.size)
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
    found = in_order(found)
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
        own = selected(first.weights, second.index)
        weights = own if weights is None else product(own, weights)
    if weights is None and is_turn(first, size) and is_turn(second, size):
        return None
    key = ("index", id(first.index), id(second.index))
    index = memo.get(key)
    if index is None:
        index = memo[key] = selected(first.index, second.index)
    return Reading(index, weights)


def _rows_by_recurrence(found: Running, node: Node, position: int) -> Node:
    """The rows that are read, as products of unit vectors with the transposed matrices."""
    sizes = node.sizes
    count, width = sizes[found.row], sizes[found.column]
    others = [size for d, size in enumerate(sizes) if d not in (found.row, found.column)]
    beside = some_array(found.matrix)
    shape = (*(1,) * len(others), count, count)
    unit = Node(
        shape, (beside,),
        lambda p, v: torch.reshape(p.call(torch.eye, count, dtype=v.dtype, device=v.device), shape), label="unit vectors",
    )  # fmt: skip
    made = applied(replace(found.transpose(), row=len(others), column=len(others) + 1), unit)
    order = [d for d in range(len(sizes)) if d not in (found.row, found.column)] + [found.column, found.row]
    back = tuple(order.index(d) for d in range(len(sizes)))
    whole = (*others, width, count)
    return Node(
        sizes, (made,), lambda p, v: torch.permute(torch.broadcast_to(v, whole), back), moved=2 * math.prod(sizes), label="rows"
    )


__all__ = ["diagonal", "gathered", "note_gathered"]

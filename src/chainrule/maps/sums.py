"""Sums of dense terms with few passes over the result: products stacked into one, diagonals added where they stand."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from chainrule.maps.bands import LARGE
from chainrule.maps.compose import Workspace, scaled
from chainrule.maps.contract import contract
from chainrule.maps.entries import Diagonal, Places, diagonals_of
from chainrule.maps.masked_products import outer_product
from chainrule.maps.nodes import Node
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Factor, Term
from chainrule.maps.views import expand_to

#: Results of fewer elements than this are as well added by one call for each term.
MANY = LARGE

#: What is made beside the result has to be smaller than the result by this factor: it is written and read once more.
SAVING = 4

#: Shorter rows than this are not worth a matrix product.
_SHORT = 16


class Split(NamedTuple):
    """Outer axes in their order as a stack of matrices: ``axes[:rows]`` count the matrices, ``axes[columns:]`` their columns."""

    rows: int
    columns: int
    cost: int


def stacked_products(
    terms: Sequence[Term], diagonals: Sequence[Diagonal], workspace: Workspace, shape: tuple[int, ...]
) -> Node | None:
    """A sum of outer products as one stack of matrix products, or None where that is not worth it.

    With axes ``b``, ``m`` and ``n``, the sum over the terms ``t`` of ``x_t[b, m] * y_t[b, n]`` is a product of matrices whose
    inner dimension counts the terms: one pass over the result instead of one (or two) for each term.

    Args:
        terms: settled terms over the same outer axes, without relations and without diagonals.
        diagonals: what is added on diagonals of the result.
        workspace: where nodes are shared.
        shape: the shape of the result.
    """
    if len(terms) < 2:
        return None
    axes = [axis for axis in terms[0].outer_axes() if axis.size != 1]
    split = _best_split(terms, axes)
    if split is None:
        return None
    stack, rows, columns = axes[: split.rows], axes[split.rows : split.columns], axes[split.columns :]
    halves = [_halves(term, set(rows), [*stack, *rows], [*stack, *columns], workspace) for term in terms]
    count = len(terms)
    names = {axis: number for number, axis in enumerate(axes)}
    places = [tuple(names[a] for a in factor.axes) for pair in halves for factor in pair]
    order = tuple(range(len(axes)))
    left, right = order[: split.columns], order[: split.rows] + order[split.columns :]
    left_sizes, right_sizes = (tuple(axes[name].size for name in names) for names in (left, right))
    b, m, n = (math.prod(axis.size for axis in group) for group in (stack, rows, columns))
    matrices = (b,) if stack else ()

    def compute(program: Program, *values: Staged) -> Staged:
        factors, written = values[: 2 * count], values[2 * count :]
        pairs = list(zip(factors[::2], places[::2], factors[1::2], places[1::2], strict=True))
        if any(_selects(program, x, y) or _selects(program, y, x) for x, _, y, _ in pairs):
            # A product with a mask selects; it is not a multiplication.
            products = [outer_product(program, x, p, y, q, order) for x, p, y, q in pairs]
            total = torch.reshape(functools.reduce(torch.add, products), shape)
            return add_to_diagonals(program, total, written, diagonals)
        x = torch.stack([torch.broadcast_to(expand_to(x, p, left), left_sizes) for x, p, _, _ in pairs], len(left))
        y = torch.stack([torch.broadcast_to(expand_to(y, q, right), right_sizes) for _, _, y, q in pairs], split.rows)
        x, y = torch.reshape(x, (*matrices, m, count)), torch.reshape(y, (*matrices, count, n))
        if not diagonals:
            return torch.reshape(torch.bmm(x, y) if matrices else torch.mm(x, y), shape)
        return program.call(product_on_diagonals, x, y, shape, [d.read(v) for d, v in zip(diagonals, written, strict=True)],
                            [d.places for d in diagonals])  # fmt: skip

    numel = math.prod(shape)
    inputs = (*(factor.node for pair in halves for factor in pair), *(d.node for d in diagonals))
    moved = numel + 2 * split.cost + sum(2 * d.node.numel for d in diagonals)
    return Node(shape, inputs, compute, flops=count * numel, moved=moved, label="stacked products")


def _selects(program: Program, x: Staged, y: Staged) -> bool:
    """Whether ``x`` is a mask whose zeros have to win over what ``y`` may hold there."""
    return x.slot in program.masks and (x.slot not in program.graded or program.has_to_select(x, y))


def _best_split(terms: Sequence[Term], axes: Sequence[Axis]) -> Split | None:
    """The split into matrices that every term allows, with the smallest stacks of factors; None where none is worth it."""
    numel = math.prod(axis.size for axis in axes)
    found: list[Split] = []
    for rows, columns in itertools.combinations(range(len(axes)), 2):
        row_axes, column_axes = set(axes[rows:columns]), set(axes[columns:])
        m, n = (math.prod(axis.size for axis in group) for group in (row_axes, column_axes))
        apart = all(row_axes.isdisjoint(f.axes) or column_axes.isdisjoint(f.axes) for term in terms for f in term.factors)
        if apart and n >= _SHORT and m >= _SHORT:
            found.append(Split(rows, columns, len(terms) * (numel // n + numel // m)))
    best = min(found, key=lambda split: split.cost, default=None)
    return best if best is not None and SAVING * best.cost <= numel else None


def _halves(
    term: Term, rows: set[Axis], left: Sequence[Axis], right: Sequence[Axis], workspace: Workspace
) -> tuple[Factor, Factor]:
    """The product of a term's factors over the rows, and that of all others."""
    one = [f for f in term.factors if not rows.isdisjoint(f.axes)]
    two = [f for f in term.factors if rows.isdisjoint(f.axes)]
    ones = Factor(workspace.ones(()), ())
    first, second = one or [ones], two or [ones]
    if term.scale != 1.0:
        side = min((first, second), key=lambda factors: min(f.node.numel for f in factors))
        smallest = min(range(len(side)), key=lambda number: side[number].node.numel)
        side[smallest] = scaled(side[smallest], term.scale, workspace)
    return contract(first, left, workspace.memo), contract(second, right, workspace.memo)


def add_to_diagonals(
    program: Program, total: Staged, values: Sequence[Staged], diagonals: Sequence[Diagonal]
) -> Staged:
    """A dense sum with terms that stand on diagonals added to it."""
    if not diagonals:
        return total
    read = [d.read(v) for d, v in zip(diagonals, values, strict=True)]
    return program.call(copy_on_diagonals, total, read, [d.places for d in diagonals])


def copy_on_diagonals(total: torch.Tensor, values: Sequence[torch.Tensor], places: Sequence[Places]) -> torch.Tensor:
    """``total`` with ``values`` added on its diagonals, as a new tensor."""
    return _added(total.clone(memory_format=torch.contiguous_format), values, places)


def product_on_diagonals(
    x: torch.Tensor, y: torch.Tensor, shape: tuple[int, ...], values: Sequence[torch.Tensor], places: Sequence[Places]
) -> torch.Tensor:
    """The matrix products of ``x`` and ``y`` as a tensor of ``shape``, with ``values`` added on its diagonals."""
    return _added(torch.matmul(x, y).reshape(shape), values, places)


def _added(total: torch.Tensor, values: Sequence[torch.Tensor], places: Sequence[Places]) -> torch.Tensor:
    for value, (sizes, repeated) in zip(values, places, strict=True):
        diagonals_of(total.view(sizes), repeated).add_(value)
    return total

"""Diagonals, traces and norms of linear maps from their non-zeros, where a contraction would make a matrix on the way.

A contraction meets a scatter into the nodes of a graph by making it dense. The entries of the same map are few, and what is
asked for is a sum over them: over those on the diagonal, over pairs that meet there, or over the squares of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from chainrule.capture.recorder import Recorder
from chainrule.capture.whole_recorder import whole_recorder
from chainrule.execute.prediction import peak_elements
from chainrule.execute.sparse import entries_predicted, execute_sparse
from chainrule.plan.algebra import Added, AlgebraRequest, Composed, Expression, Scaled, Transposed
from chainrule.plan.sparse import SparseExpression
from chainrule.transforms.spaces import Parts

if TYPE_CHECKING:
    from chainrule.transforms.linear_map import LinearMap

#: A map that takes no more bytes than this when it is dense is contracted without more ado.
_SMALL = 1 << 20

#: A contraction that holds up to this many numbers for each row and column is as good as linear.
_LINEAR = 32

#: Plans that find in every run which entries meet; where all of a map is listed, that is known beforehand.
_SORTING = frozenset({"met"})

#: An entry is moved and its place read a few times over.
_ENTRY = 4


def prefers_entries(linear_map: LinearMap, kind: str, *parts: Parts) -> bool:
    """Whether the entries of a map are fewer than what the contraction of a request holds; found out once per signature."""
    return held_by_entries(linear_map, kind, *parts) is not None


def held_by_entries(linear_map: LinearMap, kind: str, *parts: Parts) -> int | None:
    """How many numbers a request holds that reads entries; None where the contraction of the map's factors holds less."""
    m, n = linear_map.shape
    if m * n * linear_map.dtype.itemsize <= _SMALL or _without_patterns():
        return None
    tape, request, seeds = linear_map._request(kind, *parts)
    return held_by(tape, request, seeds, m, n)


def is_worth_looking(rows: int, columns: int, leaves: Sequence[torch.Tensor]) -> bool:
    """Whether a map is large when it is dense, and may have a pattern."""
    size = max((leaf.element_size() for leaf in leaves), default=4)
    return rows * columns * size > _SMALL and not _without_patterns()


def held_by(
    tape: Any, request: AlgebraRequest, seeds: Sequence[torch.Tensor], rows: int, columns: int, peak: int | None = None
) -> int | None:
    """How many numbers a request holds that reads the entries of an expression; None where the other way holds less.

    Args:
        tape: where the Jacobians of the expression were recorded.
        request: the request.
        seeds: the factors that it names.
        rows: the number of rows of the map.
        columns: that of its columns.
        peak: how many numbers the other way holds; that of the contraction of the factors if it is left out.
    """
    if peak is None:
        peak = peak_elements(tape, request, seeds, _SORTING)
    if is_linear(peak, rows, columns):
        return None
    read = list(_read(request.expression)) if request.kind in ("diagonal", "trace") else [request.expression]
    total = 0
    for expression in read:
        count = entries_predicted(tape, SparseExpression(expression), seeds, peak // _ENTRY)
        if count is None:
            return None
        total += count
    return _ENTRY * total if _ENTRY * total < peak else None


def is_linear(peak: int, rows: int, columns: int) -> bool:
    """Whether a contraction that holds so many numbers is as good as linear."""
    return peak <= _LINEAR * (rows + columns)


def _without_patterns() -> bool:
    """Whether a recording is made that is replayed with other indices; that of a whole call compares them in every call."""
    if not torch._C._len_torch_dispatch_stack() or whole_recorder() is not None:
        return False
    return any(isinstance(mode, Recorder) for mode in _get_current_dispatch_mode_stack())


def _read(expression: Expression) -> Sequence[Expression]:
    """The expressions whose entries the diagonal of another one is made from."""
    if isinstance(expression, (Transposed, Scaled)):
        return _read(expression.of)
    if isinstance(expression, Added):
        return [found for part in expression.parts for found in _read(part)]
    return [expression.left, expression.right] if isinstance(expression, Composed) else [expression]


def squares_of_entries(linear_map: LinearMap) -> torch.Tensor | None:
    """The sum of the squares of all entries; None for a map of zeros."""
    tape, request, seeds = linear_map._request("squares")
    found = execute_sparse(tape, SparseExpression(request.expression), seeds)
    total: torch.Tensor | None = None
    for values, _ in found.values():
        part = values.square().sum()
        total = part if total is None else total + part
    return total


def diagonal_of_entries(linear_map: LinearMap) -> dict[int, torch.Tensor]:
    """By the number of the leaf, the diagonal of the block of an output and the input of the same number; zeros are left out."""
    tape, request, seeds = linear_map._request("diagonal")
    flat = diagonal_of_expression(tape, request.expression, seeds)
    return {number: value.reshape(linear_map.in_space.shapes[number]) for number, value in flat.items()}


def single_entries(linear_map: LinearMap, rows: Parts, columns: Parts) -> dict[int, torch.Tensor]:
    """Single entries of blocks: the rows and the columns of each pair of leaves are read side by side.

    Returns:
        By the number of the pair, the entries; those of blocks of zeros are left out.
    """
    tape, request, seeds = linear_map._request("squares")
    found = execute_sparse(tape, SparseExpression(request.expression), seeds)
    read: dict[int, torch.Tensor] = {}
    for number, (o, i) in enumerate(zip(rows.leaves, columns.leaves, strict=True)):
        row, column = rows.local[number], columns.local[number]
        if (known := found.get((o, i))) is None or row is None or column is None:
            continue
        keys = known[1].pattern.keys
        wanted = row * known[1].pattern.columns + column
        places = torch.searchsorted(keys, wanted).clamp(max=keys.numel() - 1)
        there = keys.index_select(0, places) == wanted
        read[number] = torch.where(there, known[0].index_select(-1, places), 0.0)
    return read


def diagonal_of_expression(tape: Any, expression: Expression, seeds: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    """By the number of the leaf, the diagonal of the block of an output and the input of that number, flat, off the entries."""
    if isinstance(expression, Transposed):
        return diagonal_of_expression(tape, expression.of, seeds)
    if isinstance(expression, Scaled):
        found = diagonal_of_expression(tape, expression.of, seeds)
        factor = expression.number if expression.seed is None else seeds[expression.seed] * expression.number
        return {number: value * factor for number, value in found.items()}
    sums: dict[int, torch.Tensor] = {}
    if isinstance(expression, Added):
        for part in expression.parts:
            for number, value in diagonal_of_expression(tape, part, seeds).items():
                sums[number] = sums[number] + value if number in sums else value
        return sums
    if isinstance(expression, Composed):
        right = execute_sparse(tape, SparseExpression(expression.right), seeds)
        for (o, middle), (values, layout) in execute_sparse(tape, SparseExpression(expression.left), seeds).items():
            if (other := right.get((middle, o))) is not None:
                chosen, partners, rows = layout.meets(other[1])
                products = values.index_select(-1, chosen) * other[0].index_select(-1, partners)
                found_here = _added(rows, products, layout.pattern.rows)
                sums[o] = sums[o] + found_here if o in sums else found_here
        return sums
    for (o, i), (values, layout) in execute_sparse(tape, SparseExpression(expression), seeds).items():
        if o == i:
            chosen, rows = layout.diagonal
            sums[o] = _added(rows, values.index_select(-1, chosen), layout.pattern.rows)
    return sums


def _added(places: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=values.dtype, device=values.device).index_add(0, places, values)


__all__ = [
    "diagonal_of_entries", "diagonal_of_expression", "held_by", "held_by_entries", "is_linear", "is_worth_looking",
    "prefers_entries", "single_entries", "squares_of_entries",
]  # fmt: skip

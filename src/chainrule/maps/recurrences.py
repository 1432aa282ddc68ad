"""Recurrences along a dimension in logarithmically many steps, and entries of the halves that they make."""

from __future__ import annotations

from typing import Any

import torch

from chainrule.maps.halves import Half, calculated, joined_stack, stack_of
from chainrule.maps.nodes import Node
from chainrule.maps.staging import Staged


def scanned(seeds: Node, matrices: Node | None, *, later: bool) -> Node:
    """``s[j+1] = a[j] s[j] + seeds[j]`` from zero; with `later` from the other end, and with transposed matrices.

    Args:
        seeds: of shape ``(*batch, n, r, m)``.
        matrices: of shape ``(*batch, n, r, r)``; None for identities.
        later: whether states are made from what comes after them.
    """
    size, rank = seeds.sizes[-3:-1]
    shape = stack_of(seeds, 3) if matrices is None else joined_stack(stack_of(seeds, 3), stack_of(matrices, 3))
    sizes = (*shape, *seeds.sizes[-3:])

    def compute(x: Staged, a: Staged | None) -> Any:
        if later:
            x = torch.flip(x, [x.ndim - 3])
            a = a if a is None else torch.transpose(torch.flip(a, [a.ndim - 3]), -1, -2)
        x = torch.broadcast_to(x, sizes)
        # What the last seed leads to is not wanted.
        x = torch.narrow(x, -3, 0, size - 1)
        if a is None:
            x = torch.cumsum(x, -3)
        else:
            x = recurrence(x, torch.narrow(a, -3, 0, size - 1), rank)
        start = x.program.call(torch.zeros, (*shape, 1, *sizes[-2:]), dtype=x.dtype, device=x.device)
        x = x.program.call(torch.cat, [start, x], -3)
        return torch.flip(x, [x.ndim - 3]) if later else x

    steps = 1 if matrices is None else 2 * rank * max(size - 1, 1).bit_length()
    return calculated(compute, sizes, seeds, matrices, work=steps)


def recurrence(x: Any, a: Any, rank: int) -> Any:
    """``h[j] = a[j] h[j-1] + x[j]``, in log₂(n) steps.

    After each step a place holds the sum over twice as many places before it, and its matrix is the product over them. (The
    scan of Hillis and Steele, *Data parallel algorithms*, 1986; Blelloch, *Prefix sums and their applications*, 1990.)
    """
    size, step = x.shape[-3], 1
    cat = x.program.call
    if rank > 1:
        x, a = _of_one_dtype(x, a)
    times = torch.mul if rank == 1 else torch.matmul
    while step < size:
        rest = size - step
        after = torch.narrow(a, -3, step, rest)
        moved = torch.narrow(x, -3, step, rest) + times(after, torch.narrow(x, -3, 0, rest))
        x = cat(torch.cat, [torch.narrow(x, -3, 0, step), moved], -3)
        if 2 * step < size:
            a = cat(torch.cat, [torch.narrow(a, -3, 0, step), times(after, torch.narrow(a, -3, 0, rest))], -3)
        step *= 2
    return x


def _of_one_dtype(x: Any, y: Any) -> tuple[Any, Any]:
    dtype = torch.promote_types(x.dtype, y.dtype)
    return (x if x.dtype == dtype else x.to(dtype)), (y if y.dtype == dtype else y.to(dtype))


def _places(index: Staged | None, beside: Staged, other: Staged | None) -> Staged:
    """An index; all places where there is none."""
    if index is not None:
        return index
    assert other is not None
    return beside.program.constant(torch.arange(other.shape[0], device=other.device))


def entries_of_half(half: Half, rows: Node | None, columns: Node | None, size: int) -> Node | None:
    """Entries below the diagonal, zero elsewhere."""
    if rows is None and columns is None:
        return None
    count = place_count(rows, columns, size)
    batch = joined_stack(*[stack_of(array, 2) for array in (half.p, half.b)], () if half.a is None else stack_of(half.a, 3))

    def compute(p: Staged, a: Staged | None, b: Staged, one: Staged | None, two: Staged | None) -> Any:
        row, column = _places(one, p, two), _places(two, p, one)
        vectors = torch.index_select(b, -2, column)
        if a is not None:
            vectors = _carried(vectors, a, column, row - column - 1, size)
        found = torch.sum(torch.index_select(p, -2, row) * vectors, -1)
        return torch.where(torch.gt(row, column), found, 0.0)

    work = 2 if half.a is None else 2 * half.rank * size.bit_length()
    return calculated(compute, (*batch, count), half.p, half.a, half.b, rows, columns, work=work)


def _carried(vectors: Any, a: Any, column: Any, length: Any, size: int) -> Any:
    """Vectors times the matrices of the `length` positions behind their own: by tables of products over powers of two."""
    vectors, a = _of_one_dtype(vectors, a)
    place, step, last = column + 1, 1, size - 1
    while step < size:
        taken = torch.remainder(torch.div(torch.clamp(length, min=0), step, rounding_mode="floor"), 2) == 1
        matrices = torch.index_select(a, -3, torch.clamp(place, max=last))
        moved = torch.squeeze(torch.matmul(matrices, torch.unsqueeze(vectors, -1)), -1)
        vectors = torch.where(torch.unsqueeze(taken, -1), moved, vectors)
        place = torch.where(taken, place + step, place)
        rest = size - step
        if rest > 0:
            product_of = torch.matmul(torch.narrow(a, -3, step, rest), torch.narrow(a, -3, 0, rest))
            a = vectors.program.call(torch.cat, [product_of, torch.narrow(a, -3, rest, step)], -3)
        step *= 2
    return vectors


def entries_of_diagonal(diagonal: Staged, rows: Staged | None, columns: Staged | None) -> Any:
    """Entries on the diagonal at places that are read side by side, zero elsewhere; None for all places in order."""
    if rows is None and columns is None:
        return diagonal
    one, two = (_places(index, diagonal, other) for index, other in ((rows, columns), (columns, rows)))
    return torch.where(torch.eq(one, two), torch.index_select(diagonal, -1, one), 0.0)


def place_count(rows: Node | None, columns: Node | None, size: int) -> int:
    """How many places are read."""
    return next((index.sizes[0] for index in (rows, columns) if index is not None), size)


__all__ = ["entries_of_diagonal", "entries_of_half", "place_count", "recurrence", "scanned"]

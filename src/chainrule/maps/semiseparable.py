"""Square matrices whose halves are made by recurrences: products, sums and single entries of them in linear time.

Below its diagonal such a matrix is ``p[i] · A[i-1] ··· A[j+1] · b[j]`` with few numbers for each position: what a running sum
(``A`` is one), a running product and their compositions are. It is never made: with a vector it is multiplied by running the
recurrence, and products of two of them, element by element or as matrices, with a diagonal in between, are of the same kind.

Source: Eidelman and Gohberg, *On a new class of structured matrices* (1999); Vandebril, Van Barel and Mastronardi, *Matrix
Computations and Semiseparable Matrices* (2008).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from chainrule.maps.halves import (
    Half,
    added,
    block_matrices,
    calculated,
    carried_by,
    flipped,
    half_of_products,
    half_of_sum,
    joined_stack,
    matrices_times,
    matrix_products,
    product,
    rank_of,
    side_by_side,
    stack_of,
    transposed,
    vector_products,
    weighted,
    zeros_beside,
)
from chainrule.maps.nodes import Node
from chainrule.maps.recurrences import entries_of_diagonal, entries_of_half, place_count, scanned

#: Recurrences of more numbers than this are not worth their matrices.
MOST = 8


@dataclass(frozen=True)
class Semiseparable:
    """A stack of square matrices: a diagonal, and what stands below and above it. None stands for zeros.

    Attributes:
        size: the number of rows.
        diagonal: of shape ``(*batch, n)``; dimensions of the stack in which an array does not differ have size one.
        lower: what stands below the diagonal.
        upper: the transpose of what stands above it.
    """

    size: int
    diagonal: Node | None
    lower: Half | None
    upper: Half | None

    def transpose(self) -> Semiseparable:
        """The transposed matrices."""
        return replace(self, lower=self.upper, upper=self.lower)

    def restacked(self, change: Callable[[Node, int], Node]) -> Semiseparable:
        """The matrices with other dimensions of their stack.

        Args:
            change: makes an array from one of these, and how many of its dimensions stand behind those of the stack.
        """

        def half(found: Half | None) -> Half | None:
            if found is None:
                return None
            return Half(change(found.p, 2), None if found.a is None else change(found.a, 3), change(found.b, 2))

        return replace(
            self, diagonal=self.diagonal and change(self.diagonal, 1), lower=half(self.lower), upper=half(self.upper)
        )

    def scaled(self, weights: Node, side: int) -> Semiseparable:
        """The rows (side 0) or columns (side 1) times numbers: an array of shape ``(*batch, n)``, or ``(*batch, 1)``."""
        lower, upper = self.lower, self.upper
        if lower is not None:
            lower = lower._replace(**{"pb"[side]: weighted("pb"[side], lower, weights)})
        if upper is not None:
            upper = upper._replace(**{"bp"[side]: weighted("bp"[side], upper, weights)})
        return replace(self, diagonal=product(self.diagonal, weights), lower=lower, upper=upper)

    def multiplied(self, number: float) -> Semiseparable:
        """The matrices times a number."""

        def times(node: Node) -> Node:
            return calculated(lambda x: x * number, node.sizes, node)

        diagonal = None if self.diagonal is None else times(self.diagonal)
        lower, upper = (half and half._replace(p=times(half.p)) for half in (self.lower, self.upper))
        return replace(self, diagonal=diagonal, lower=lower, upper=upper)

    def reversed(self) -> Semiseparable:
        """The matrices with rows and columns in the opposite order."""

        def half(found: Half | None) -> Half | None:
            if found is None:
                return None
            a = None if found.a is None else transposed(flipped(found.a, -3))
            return Half(flipped(found.b, -2), a, flipped(found.p, -2))

        diagonal = None if self.diagonal is None else flipped(self.diagonal, -1)
        return replace(self, diagonal=diagonal, lower=half(self.upper), upper=half(self.lower))

    def elementwise(self, other: Semiseparable) -> Semiseparable | None:
        """The products of entries at the same place; None where they take too many numbers."""
        lower, upper = (half_of_products(one, two) for one, two in ((self.lower, other.lower), (self.upper, other.upper)))
        return _of_bounded_rank(replace(self, diagonal=product(self.diagonal, other.diagonal), lower=lower, upper=upper))

    def plus(self, other: Semiseparable) -> Semiseparable | None:
        """The sum; None where it takes too many numbers."""
        lower, upper = (half_of_sum(one, two) for one, two in ((self.lower, other.lower), (self.upper, other.upper)))
        diagonal = added(self.diagonal, other.diagonal)
        return _of_bounded_rank(replace(self, diagonal=diagonal, lower=lower, upper=upper))

    def times(self, other: Semiseparable, weights: Node | None) -> Semiseparable | None:
        """The matrix product with a diagonal in between; None where it takes too many numbers.

        Args:
            other: the matrices on the right.
            weights: the diagonal; None for ones.
        """
        one = self if weights is None else self.scaled(weights, 1)
        if max(rank_of(self.lower) + rank_of(other.lower), rank_of(self.upper) + rank_of(other.upper)) > MOST:
            return None
        if max(rank_of(self.lower) * rank_of(other.upper), rank_of(self.upper) * rank_of(other.lower)) > MOST:
            return None
        symmetric = self.lower is other.upper and self.upper is other.lower and self.diagonal is other.diagonal
        diagonal = product(one.diagonal, other.diagonal)
        before = _met(one.lower, other.upper, after=False)
        after = _met(one.upper, other.lower, after=True)
        if before is not None:
            assert one.lower is not None and other.upper is not None
            diagonal = added(diagonal, _between(one.lower.p, before, other.upper.p))
        if after is not None:
            assert one.upper is not None and other.lower is not None
            diagonal = added(diagonal, _between(one.upper.b, after, other.lower.b))
        lower = _lower_of_product(one, other, before, after)
        if symmetric:
            return Semiseparable(self.size, diagonal, lower, lower)
        turned = (None if met is None else transposed(met) for met in (before, after))
        upper = _lower_of_product(other.transpose(), one.transpose(), *turned)
        return Semiseparable(self.size, diagonal, lower, upper)

    def apply(self, vectors: Node) -> Node:
        """The products with vectors, of shapes ``(*batch, n, m)``."""
        found: Node | None = None
        if self.diagonal is not None:
            found = calculated(lambda d, x: torch.unsqueeze(d, -1) * x, _wider(self.diagonal, vectors, 1), self.diagonal, vectors)
        for half, later in ((self.lower, False), (self.upper, True)):
            if half is None:
                continue
            into, out = (half.p, half.b) if later else (half.b, half.p)
            shape = (*joined_stack(stack_of(into, 2), stack_of(vectors, 2)), self.size, half.rank, vectors.sizes[-1])
            seeds = calculated(lambda q, x: torch.unsqueeze(q, -1) * torch.unsqueeze(x, -2), shape, into, vectors)
            states = scanned(seeds, half.a, later=later)
            shape = (*joined_stack(stack_of(out, 2), stack_of(states, 3)), self.size, vectors.sizes[-1])
            part = calculated(lambda q, s: torch.sum(torch.unsqueeze(q, -1) * s, -2), shape, out, states, work=2 * half.rank)
            found = added(found, part)
        return found if found is not None else zeros_beside(vectors, vectors.sizes)

    def entries(self, rows: Node | None, columns: Node | None, beside: Node) -> Node:
        """Entries at places that are read side by side; None for all places in order. Of shape ``(*batch, k)``."""
        found: Node | None = None
        if self.diagonal is not None:
            sizes = (*stack_of(self.diagonal, 1), place_count(rows, columns, self.size))
            found = calculated(entries_of_diagonal, sizes, self.diagonal, rows, columns)
        for half, one, two in ((self.lower, rows, columns), (self.upper, columns, rows)):
            if half is not None:
                found = added(found, entries_of_half(half, one, two, self.size))
        return found if found is not None else zeros_beside(beside, (place_count(rows, columns, self.size),))


def _of_bounded_rank(found: Semiseparable) -> Semiseparable | None:
    return None if max(rank_of(found.lower), rank_of(found.upper)) > MOST else found


def _wider(one: Node, vectors: Node, behind: int) -> tuple[int, ...]:
    return (*joined_stack(stack_of(one, behind), stack_of(vectors, behind + 1)), *vectors.sizes[-2:])


def _met(one: Half | None, two: Half | None, *, after: bool) -> Node | None:
    """Where a half meets one that is transposed: at each position the sum over all positions before it (or after it).

    Of shape ``(*batch, n, r, s)``.
    """
    if one is None or two is None:
        return None
    seeds = vector_products(one.p, two.p) if after else vector_products(one.b, two.b)
    column = calculated(lambda x: torch.unsqueeze(x, -1), (*seeds.sizes, 1), seeds, work=0)
    states = scanned(column, matrix_products(one, two), later=after)
    sizes = (*stack_of(states, 2), one.rank, two.rank)
    return calculated(lambda x: torch.reshape(x, sizes), sizes, states, work=0)


def _between(left: Node, middle: Node, right: Node) -> Node:
    """Products of vectors, matrices and vectors."""
    sizes = joined_stack(stack_of(left, 1), stack_of(middle, 2), stack_of(right, 1))
    return calculated(
        lambda x, m, y: torch.sum(torch.unsqueeze(x, -1) * m * torch.unsqueeze(y, -2), (-1, -2)), sizes, left, middle, right,
        work=3 * middle.sizes[-1] * middle.sizes[-2],
    )  # fmt: skip


def _lower_of_product(one: Semiseparable, two: Semiseparable, before: Node | None, after: Node | None) -> Half | None:
    """What stands below the diagonal of a product.

    Args:
        one: the left matrices.
        two: the right ones.
        before: at each position, what the left lower and the right upper half meet in before it.
        after: what the left upper and the right lower half meet in after it.
    """
    first = second = None
    if one.lower is not None:
        b = None if two.diagonal is None else weighted("b", one.lower, two.diagonal)
        if before is not None:
            assert two.upper is not None
            b = added(b, carried_by(one.lower.a, matrices_times(before, two.upper.p)))
        if b is not None or two.lower is not None:
            first = Half(one.lower.p, one.lower.a, b if b is not None else zeros_beside(one.lower.b, one.lower.b.sizes))
    if two.lower is not None:
        p = None if one.diagonal is None else weighted("p", two.lower, one.diagonal)
        if after is not None:
            assert one.upper is not None
            met = matrices_times(transposed(after), one.upper.b)
            p = added(p, carried_by(None if two.lower.a is None else transposed(two.lower.a), met))
        if p is not None or one.lower is not None:
            second = Half(p if p is not None else zeros_beside(two.lower.p, two.lower.p.sizes), two.lower.a, two.lower.b)
    if first is None or second is None:
        return first or second
    assert one.lower is not None and two.lower is not None
    inner, outer = one.lower.b, two.lower.p
    sizes = (*joined_stack(stack_of(inner, 1), stack_of(outer, 1)), first.rank, second.rank)
    corner = calculated(lambda x, y: torch.unsqueeze(x, -1) * torch.unsqueeze(y, -2), sizes, inner, outer)
    return Half(side_by_side(first.p, second.p), block_matrices(first, second, corner), side_by_side(first.b, second.b))


__all__ = ["Semiseparable"]

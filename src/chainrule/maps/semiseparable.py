"""Square matrices whose halves are made by recurrences: products, sums and single entries of them in linear time.

Below its diagonal such a matrix is ``p[i] · A[i-1] ··· A[j+1] · b[j]`` with few numbers for each position: what a running sum
(``A`` is one), a running product and their compositions are. It is never made: with a vector it is multiplied by running the
recurrence, and products of two of them, element by element or as matrices, with a diagonal in between, are of the same kind.

Source: Eidelman and Gohberg, *On a new class of structured matrices* (1999); Vandebril, Van Barel and Mastronardi, *Matrix
Computations and Semiseparable Matrices* (2008).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from chainrule.maps.nodes import Node
from chainrule.maps.staging import Program, Staged

#: Recurrences of more numbers than this are not worth their matrices.
MOST = 8


class Half(NamedTuple):
    """What stands below a diagonal: ``p[i] · a[i-1] ··· a[j+1] · b[j]`` for ``i > j``.

    Attributes:
        p: of shape ``(*batch, n, r)``.
        a: of shape ``(*batch, n, r, r)``; None for identities.
        b: of shape ``(*batch, n, r)``.
    """

    p: Node
    a: Node | None
    b: Node

    @property
    def rank(self) -> int:
        """How many numbers the recurrence holds."""
        return self.p.sizes[-1]


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
            return _calc(lambda x: x * number, node.sizes, node)

        diagonal = None if self.diagonal is None else times(self.diagonal)
        lower, upper = (half and half._replace(p=times(half.p)) for half in (self.lower, self.upper))
        return replace(self, diagonal=diagonal, lower=lower, upper=upper)

    def reversed(self) -> Semiseparable:
        """The matrices with rows and columns in the opposite order."""

        def half(found: Half | None) -> Half | None:
            if found is None:
                return None
            a = None if found.a is None else _transposed(flipped(found.a, -3))
            return Half(flipped(found.b, -2), a, flipped(found.p, -2))

        diagonal = None if self.diagonal is None else flipped(self.diagonal, -1)
        return replace(self, diagonal=diagonal, lower=half(self.upper), upper=half(self.lower))

    def elementwise(self, other: Semiseparable) -> Semiseparable | None:
        """The products of entries at the same place; None where they take too many numbers."""
        lower, upper = (_both(one, two) for one, two in ((self.lower, other.lower), (self.upper, other.upper)))
        return _of_bounded_rank(replace(self, diagonal=product(self.diagonal, other.diagonal), lower=lower, upper=upper))

    def plus(self, other: Semiseparable) -> Semiseparable | None:
        """The sum; None where it takes too many numbers."""
        lower, upper = (_either(one, two) for one, two in ((self.lower, other.lower), (self.upper, other.upper)))
        diagonal = added(self.diagonal, other.diagonal)
        return _of_bounded_rank(replace(self, diagonal=diagonal, lower=lower, upper=upper))

    def times(self, other: Semiseparable, weights: Node | None) -> Semiseparable | None:
        """The matrix product with a diagonal in between; None where it takes too many numbers.

        Args:
            other: the matrices on the right.
            weights: the diagonal; None for ones.
        """
        one = self if weights is None else self.scaled(weights, 1)
        if max(_rank(self.lower) + _rank(other.lower), _rank(self.upper) + _rank(other.upper)) > MOST:
            return None
        if max(_rank(self.lower) * _rank(other.upper), _rank(self.upper) * _rank(other.lower)) > MOST:
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
        turned = (None if met is None else _transposed(met) for met in (before, after))
        upper = _lower_of_product(other.transpose(), one.transpose(), *turned)
        return Semiseparable(self.size, diagonal, lower, upper)

    def apply(self, vectors: Node) -> Node:
        """The products with vectors, of shapes ``(*batch, n, m)``."""
        found: Node | None = None
        if self.diagonal is not None:
            found = _calc(lambda d, x: torch.unsqueeze(d, -1) * x, _wider(self.diagonal, vectors, 1), self.diagonal, vectors)
        for half, later in ((self.lower, False), (self.upper, True)):
            if half is None:
                continue
            into, out = (half.p, half.b) if later else (half.b, half.p)
            shape = (*_stack(_shape(into, 2), _shape(vectors, 2)), self.size, half.rank, vectors.sizes[-1])
            seeds = _calc(lambda q, x: torch.unsqueeze(q, -1) * torch.unsqueeze(x, -2), shape, into, vectors)
            states = scanned(seeds, half.a, later=later)
            shape = (*_stack(_shape(out, 2), _shape(states, 3)), self.size, vectors.sizes[-1])
            part = _calc(lambda q, s: torch.sum(torch.unsqueeze(q, -1) * s, -2), shape, out, states, work=2 * half.rank)
            found = added(found, part)
        return found if found is not None else zeros_beside(vectors, vectors.sizes)

    def entries(self, rows: Node | None, columns: Node | None, beside: Node) -> Node:
        """Entries at places that are read side by side; None for all places in order. Of shape ``(*batch, k)``."""
        found: Node | None = None
        if self.diagonal is not None:
            sizes = (*_shape(self.diagonal, 1), _count(rows, columns, self.size))
            found = _calc(_on_diagonal, sizes, self.diagonal, rows, columns)
        for half, one, two in ((self.lower, rows, columns), (self.upper, columns, rows)):
            if half is not None:
                found = added(found, _entries_of_half(half, one, two, self.size))
        return found if found is not None else zeros_beside(beside, (_count(rows, columns, self.size),))


def _count(rows: Node | None, columns: Node | None, size: int) -> int:
    return next((index.sizes[0] for index in (rows, columns) if index is not None), size)


def _rank(half: Half | None) -> int:
    return 0 if half is None else half.rank


def _of_bounded_rank(found: Semiseparable) -> Semiseparable | None:
    return None if max(_rank(found.lower), _rank(found.upper)) > MOST else found


def _shape(node: Node, behind: int) -> tuple[int, ...]:
    return node.sizes[: len(node.sizes) - behind]


def _stack(*shapes: Sequence[int]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*[tuple(shape) for shape in shapes]))


def _wider(one: Node, vectors: Node, behind: int) -> tuple[int, ...]:
    return (*_stack(_shape(one, behind), _shape(vectors, behind + 1)), *vectors.sizes[-2:])


def _calc(function: Callable[..., Any], sizes: Sequence[int], *inputs: Node | None, work: int = 1) -> Node:
    """The node of a calculation; inputs that are None are given as None."""
    there = [node is not None for node in inputs]

    def compute(program: Program, *values: Staged) -> Staged:
        given = iter(values)
        return function(*[next(given) if here else None for here in there])  # type: ignore[no-any-return]

    numel = math.prod(sizes)
    nodes = tuple(node for node in inputs if node is not None)
    return Node(sizes, nodes, compute, flops=work * numel, moved=2 * numel, label="recurrence")


def product(one: Node | None, two: Node | None) -> Node | None:
    """The element-wise product of arrays, where None stands for zeros."""
    if one is None or two is None:
        return None
    return _calc(torch.mul, _stack(one.sizes, two.sizes), one, two)


def added(one: Node | None, two: Node | None) -> Node | None:
    """The sum of arrays, where None stands for zeros."""
    if one is None or two is None:
        return one if two is None else two
    return _calc(torch.add, _stack(one.sizes, two.sizes), one, two)


def zeros_beside(node: Node, sizes: Sequence[int]) -> Node:
    """Zeros of the dtype and on the device of another array."""
    shape = tuple(sizes)
    return Node(
        shape, (node,), lambda program, v: program.call(torch.zeros, shape, dtype=v.dtype, device=v.device), label="zeros"
    )


def weighted(name: str, half: Half, weights: Node) -> Node:
    """One of the arrays of a half times numbers at its positions."""
    array: Node = getattr(half, name)
    sizes = (*_stack(_shape(array, 1), weights.sizes), half.rank)
    return _calc(lambda x, w: x * torch.unsqueeze(w, -1), sizes, array, weights)


def flipped(node: Node, dim: int) -> Node:
    """An array in the opposite order along a dimension."""
    return _calc(lambda x: torch.flip(x, [x.ndim + dim]), node.sizes, node)


def _transposed(node: Node) -> Node:
    sizes = (*node.sizes[:-2], node.sizes[-1], node.sizes[-2])
    return _calc(lambda x: torch.transpose(x, -1, -2), sizes, node, work=0)


def _both(one: Half | None, two: Half | None) -> Half | None:
    """The half of element-wise products."""
    if one is None or two is None:
        return None
    return Half(_vectors(one.p, two.p), _matrices(one, two), _vectors(one.b, two.b))


def _vectors(one: Node, two: Node) -> Node:
    """Kronecker products of vectors."""
    rank = one.sizes[-1] * two.sizes[-1]
    sizes = (*_stack(_shape(one, 1), _shape(two, 1)), rank)
    if rank == 1:
        return _calc(torch.mul, sizes, one, two)
    return _calc(lambda x, y: torch.reshape(torch.unsqueeze(x, -1) * torch.unsqueeze(y, -2), sizes), sizes, one, two)


def _matrices(one: Half, two: Half) -> Node | None:
    """Kronecker products of matrices."""
    if one.a is None and two.a is None:
        return None
    for first, second in ((one, two), (two, one)):
        if first.a is None and first.rank == 1:
            return second.a
    a, b = (half.a if half.a is not None else _identities(half) for half in (one, two))
    rank = one.rank * two.rank
    sizes = (*_stack(_shape(a, 2), _shape(b, 2)), rank, rank)
    if rank == 1:
        return _calc(torch.mul, sizes, a, b)

    def compute(x: Staged, y: Staged) -> Any:
        left = torch.unsqueeze(torch.unsqueeze(x, -1), -3)  # (.., r, 1, r, 1)
        right = torch.unsqueeze(torch.unsqueeze(y, -2), -4)  # (.., 1, s, 1, s)
        return torch.reshape(left * right, sizes)

    return _calc(compute, sizes, a, b)


def _identities(half: Half) -> Node:
    rank = half.rank
    sizes = ((1,) * (len(half.p.sizes) - 2) + (half.p.sizes[-2], rank, rank))

    def compute(program: Program, p: Staged) -> Staged:
        return torch.broadcast_to(program.call(torch.eye, rank, dtype=p.dtype, device=p.device), sizes)

    return Node(sizes, (half.p,), compute, label="identities")


def _either(one: Half | None, two: Half | None) -> Half | None:
    """The half of a sum."""
    if one is None or two is None:
        return one if two is None else two
    if one.a is two.a and one.b is two.b:
        return one._replace(p=_calc(torch.add, _stack(one.p.sizes, two.p.sizes), one.p, two.p))
    if one.a is two.a and one.p is two.p:
        return one._replace(b=_calc(torch.add, _stack(one.b.sizes, two.b.sizes), one.b, two.b))
    a = None if one.a is None and two.a is None else _block_matrices(one, two, None)
    return Half(_beside(one.p, two.p), a, _beside(one.b, two.b))


def _beside(*arrays: Node) -> Node:
    """Vectors one after the other."""
    if len(arrays) == 1:
        return arrays[0]
    shape = _stack(*[_shape(array, 1) for array in arrays])
    sizes = (*shape, sum(array.sizes[-1] for array in arrays))

    def compute(*values: Staged) -> Any:
        parts = [torch.broadcast_to(v, (*shape, v.shape[-1])) for v in values]
        return values[0].program.call(torch.cat, parts, -1)

    return _calc(compute, sizes, *arrays)


def _block_matrices(one: Half, two: Half, corner: Node | None) -> Node:
    """Matrices with those of two halves on their diagonals, and a block above."""
    a, b = (half.a if half.a is not None else _identities(half) for half in (one, two))
    r, s = one.rank, two.rank
    shape = _stack(_shape(a, 2), _shape(b, 2), *([] if corner is None else [_shape(corner, 2)]))
    sizes = (*shape, r + s, r + s)

    def compute(x: Staged, y: Staged, z: Staged | None) -> Any:
        call = x.program.call
        zeros = lambda m, n: call(torch.zeros, (*shape, m, n), dtype=x.dtype, device=x.device)  # noqa: E731
        right = zeros(r, s) if z is None else torch.broadcast_to(z, (*shape, r, s))
        above = call(torch.cat, [torch.broadcast_to(x, (*shape, r, r)), right], -1)
        below = call(torch.cat, [zeros(s, r), torch.broadcast_to(y, (*shape, s, s))], -1)
        return call(torch.cat, [above, below], -2)

    return _calc(compute, sizes, a, b, corner)


def _met(one: Half | None, two: Half | None, *, after: bool) -> Node | None:
    """Where a half meets one that is transposed: at each position the sum over all positions before it (or after it).

    Of shape ``(*batch, n, r, s)``.
    """
    if one is None or two is None:
        return None
    seeds = _vectors(one.p, two.p) if after else _vectors(one.b, two.b)
    column = _calc(lambda x: torch.unsqueeze(x, -1), (*seeds.sizes, 1), seeds, work=0)
    states = scanned(column, _matrices(one, two), later=after)
    sizes = (*_shape(states, 2), one.rank, two.rank)
    return _calc(lambda x: torch.reshape(x, sizes), sizes, states, work=0)


def _between(left: Node, middle: Node, right: Node) -> Node:
    """Products of vectors, matrices and vectors."""
    sizes = _stack(_shape(left, 1), _shape(middle, 2), _shape(right, 1))
    return _calc(
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
            b = added(b, _through(one.lower.a, _times(before, two.upper.p)))
        if b is not None or two.lower is not None:
            first = Half(one.lower.p, one.lower.a, b if b is not None else zeros_beside(one.lower.b, one.lower.b.sizes))
    if two.lower is not None:
        p = None if one.diagonal is None else weighted("p", two.lower, one.diagonal)
        if after is not None:
            assert one.upper is not None
            met = _times(_transposed(after), one.upper.b)
            p = added(p, _through(None if two.lower.a is None else _transposed(two.lower.a), met))
        if p is not None or one.lower is not None:
            second = Half(p if p is not None else zeros_beside(two.lower.p, two.lower.p.sizes), two.lower.a, two.lower.b)
    if first is None or second is None:
        return first or second
    assert one.lower is not None and two.lower is not None
    inner, outer = one.lower.b, two.lower.p
    sizes = (*_stack(_shape(inner, 1), _shape(outer, 1)), first.rank, second.rank)
    corner = _calc(lambda x, y: torch.unsqueeze(x, -1) * torch.unsqueeze(y, -2), sizes, inner, outer)
    return Half(_beside(first.p, second.p), _block_matrices(first, second, corner), _beside(first.b, second.b))


def _times(matrices: Node, vectors: Node) -> Node:
    """Products of matrices and vectors at each position."""
    sizes = (*_stack(_shape(matrices, 2), _shape(vectors, 1)), matrices.sizes[-2])
    return _calc(
        lambda m, x: torch.sum(m * torch.unsqueeze(x, -2), -1), sizes, matrices, vectors, work=2 * matrices.sizes[-1]
    )


def _through(matrices: Node | None, vectors: Node) -> Node:
    return vectors if matrices is None else _times(matrices, vectors)


def scanned(seeds: Node, matrices: Node | None, *, later: bool) -> Node:
    """``s[j+1] = a[j] s[j] + seeds[j]`` from zero; with `later` from the other end, and with transposed matrices.

    Args:
        seeds: of shape ``(*batch, n, r, m)``.
        matrices: of shape ``(*batch, n, r, r)``; None for identities.
        later: whether states are made from what comes after them.
    """
    size, rank = seeds.sizes[-3:-1]
    shape = _shape(seeds, 3) if matrices is None else _stack(_shape(seeds, 3), _shape(matrices, 3))
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
    return _calc(compute, sizes, seeds, matrices, work=steps)


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


def _on_diagonal(diagonal: Staged, rows: Staged | None, columns: Staged | None) -> Any:
    if rows is None and columns is None:
        return diagonal
    one, two = (_places(index, diagonal, other) for index, other in ((rows, columns), (columns, rows)))
    return torch.where(torch.eq(one, two), torch.index_select(diagonal, -1, one), 0.0)


def _places(index: Staged | None, beside: Staged, other: Staged | None) -> Staged:
    """An index; all places where there is none."""
    if index is not None:
        return index
    assert other is not None
    return beside.program.constant(torch.arange(other.shape[0], device=other.device))


def _entries_of_half(half: Half, rows: Node | None, columns: Node | None, size: int) -> Node | None:
    """Entries below the diagonal, zero elsewhere."""
    if rows is None and columns is None:
        return None
    count = _count(rows, columns, size)
    batch = _stack(*[_shape(array, 2) for array in (half.p, half.b)], () if half.a is None else _shape(half.a, 3))

    def compute(p: Staged, a: Staged | None, b: Staged, one: Staged | None, two: Staged | None) -> Any:
        row, column = _places(one, p, two), _places(two, p, one)
        vectors = torch.index_select(b, -2, column)
        if a is not None:
            vectors = _carried(vectors, a, column, row - column - 1, size)
        found = torch.sum(torch.index_select(p, -2, row) * vectors, -1)
        return torch.where(torch.gt(row, column), found, 0.0)

    work = 2 if half.a is None else 2 * half.rank * size.bit_length()
    return _calc(compute, (*batch, count), half.p, half.a, half.b, rows, columns, work=work)


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


__all__ = ["Half", "Semiseparable", "added", "flipped", "product", "recurrence", "scanned", "zeros_beside"]

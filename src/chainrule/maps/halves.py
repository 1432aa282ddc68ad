"""Halves of matrices that are made by recurrences: what stands below a diagonal, their sums and element-wise products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from chainrule.maps.nodes import Node
from chainrule.maps.staging import Program, Staged
from chainrule.shapes import broadcast_shapes


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


def rank_of(half: Half | None) -> int:
    """How many numbers a recurrence holds; none where there is none."""
    return 0 if half is None else half.rank


def stack_of(node: Node, behind: int) -> tuple[int, ...]:
    """The dimensions of the stack, which come before those ``behind``."""
    return node.sizes[: len(node.sizes) - behind]


def joined_stack(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The dimensions of a stack of arrays that have some of them."""
    return tuple(broadcast_shapes(*shapes))


def calculated(function: Callable[..., Any], sizes: Sequence[int], *inputs: Node | None, work: int = 1) -> Node:
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
    return calculated(torch.mul, joined_stack(one.sizes, two.sizes), one, two)


def added(one: Node | None, two: Node | None) -> Node | None:
    """The sum of arrays, where None stands for zeros."""
    if one is None or two is None:
        return one if two is None else two
    return calculated(torch.add, joined_stack(one.sizes, two.sizes), one, two)


def zeros_beside(node: Node, sizes: Sequence[int]) -> Node:
    """Zeros of the dtype and on the device of another array."""
    shape = tuple(sizes)
    return Node(
        shape, (node,), lambda program, v: program.call(torch.zeros, shape, dtype=v.dtype, device=v.device), label="zeros"
    )


def weighted(name: str, half: Half, weights: Node) -> Node:
    """One of the arrays of a half times numbers at its positions."""
    array: Node = getattr(half, name)
    sizes = (*joined_stack(stack_of(array, 1), weights.sizes), half.rank)
    return calculated(lambda x, w: x * torch.unsqueeze(w, -1), sizes, array, weights)


def flipped(node: Node, dim: int) -> Node:
    """An array in the opposite order along a dimension."""
    return calculated(lambda x: torch.flip(x, [x.ndim + dim]), node.sizes, node)


def transposed(node: Node) -> Node:
    """The transposed matrices."""
    sizes = (*node.sizes[:-2], node.sizes[-1], node.sizes[-2])
    return calculated(lambda x: torch.transpose(x, -1, -2), sizes, node, work=0)


def half_of_products(one: Half | None, two: Half | None) -> Half | None:
    """The half of element-wise products."""
    if one is None or two is None:
        return None
    return Half(vector_products(one.p, two.p), matrix_products(one, two), vector_products(one.b, two.b))


def vector_products(one: Node, two: Node) -> Node:
    """Kronecker products of vectors."""
    rank = one.sizes[-1] * two.sizes[-1]
    sizes = (*joined_stack(stack_of(one, 1), stack_of(two, 1)), rank)
    if rank == 1:
        return calculated(torch.mul, sizes, one, two)
    return calculated(lambda x, y: torch.reshape(torch.unsqueeze(x, -1) * torch.unsqueeze(y, -2), sizes), sizes, one, two)


def matrix_products(one: Half, two: Half) -> Node | None:
    """Kronecker products of matrices."""
    if one.a is None and two.a is None:
        return None
    for first, second in ((one, two), (two, one)):
        if first.a is None and first.rank == 1:
            return second.a
    a, b = (half.a if half.a is not None else _identities(half) for half in (one, two))
    rank = one.rank * two.rank
    sizes = (*joined_stack(stack_of(a, 2), stack_of(b, 2)), rank, rank)
    if rank == 1:
        return calculated(torch.mul, sizes, a, b)

    def compute(x: Staged, y: Staged) -> Any:
        left = torch.unsqueeze(torch.unsqueeze(x, -1), -3)  # (.., r, 1, r, 1)
        right = torch.unsqueeze(torch.unsqueeze(y, -2), -4)  # (.., 1, s, 1, s)
        return torch.reshape(left * right, sizes)

    return calculated(compute, sizes, a, b)


def _identities(half: Half) -> Node:
    rank = half.rank
    sizes = ((1,) * (len(half.p.sizes) - 2) + (half.p.sizes[-2], rank, rank))

    def compute(program: Program, p: Staged) -> Staged:
        return torch.broadcast_to(program.call(torch.eye, rank, dtype=p.dtype, device=p.device), sizes)

    return Node(sizes, (half.p,), compute, label="identities")


def half_of_sum(one: Half | None, two: Half | None) -> Half | None:
    """The half of a sum."""
    if one is None or two is None:
        return one if two is None else two
    if one.a is two.a and one.b is two.b:
        return one._replace(p=calculated(torch.add, joined_stack(one.p.sizes, two.p.sizes), one.p, two.p))
    if one.a is two.a and one.p is two.p:
        return one._replace(b=calculated(torch.add, joined_stack(one.b.sizes, two.b.sizes), one.b, two.b))
    a = None if one.a is None and two.a is None else block_matrices(one, two, None)
    return Half(side_by_side(one.p, two.p), a, side_by_side(one.b, two.b))


def side_by_side(*arrays: Node) -> Node:
    """Vectors one after the other."""
    if len(arrays) == 1:
        return arrays[0]
    shape = joined_stack(*[stack_of(array, 1) for array in arrays])
    sizes = (*shape, sum(array.sizes[-1] for array in arrays))

    def compute(*values: Staged) -> Any:
        parts = [torch.broadcast_to(v, (*shape, v.shape[-1])) for v in values]
        return values[0].program.call(torch.cat, parts, -1)

    return calculated(compute, sizes, *arrays)


def block_matrices(one: Half, two: Half, corner: Node | None) -> Node:
    """Matrices with those of two halves on their diagonals, and a block above."""
    a, b = (half.a if half.a is not None else _identities(half) for half in (one, two))
    r, s = one.rank, two.rank
    shape = joined_stack(stack_of(a, 2), stack_of(b, 2), *([] if corner is None else [stack_of(corner, 2)]))
    sizes = (*shape, r + s, r + s)

    def compute(x: Staged, y: Staged, z: Staged | None) -> Any:
        call = x.program.call
        zeros = lambda m, n: call(torch.zeros, (*shape, m, n), dtype=x.dtype, device=x.device)  # noqa: E731
        right = zeros(r, s) if z is None else torch.broadcast_to(z, (*shape, r, s))
        above = call(torch.cat, [torch.broadcast_to(x, (*shape, r, r)), right], -1)
        below = call(torch.cat, [zeros(s, r), torch.broadcast_to(y, (*shape, s, s))], -1)
        return call(torch.cat, [above, below], -2)

    return calculated(compute, sizes, a, b, corner)


def matrices_times(matrices: Node, vectors: Node) -> Node:
    """Products of matrices and vectors at each position."""
    sizes = (*joined_stack(stack_of(matrices, 2), stack_of(vectors, 1)), matrices.sizes[-2])
    return calculated(
        lambda m, x: torch.sum(m * torch.unsqueeze(x, -2), -1), sizes, matrices, vectors, work=2 * matrices.sizes[-1]
    )


def carried_by(matrices: Node | None, vectors: Node) -> Node:
    """Vectors times the matrices at their positions; None stands for identities."""
    return vectors if matrices is None else matrices_times(matrices, vectors)


__all__ = [
    "Half", "added", "block_matrices", "calculated", "carried_by", "flipped", "half_of_products", "half_of_sum",
    "joined_stack", "matrices_times", "matrix_products", "product", "rank_of", "side_by_side", "stack_of", "transposed",
    "vector_products", "weighted", "zeros_beside",
]  # fmt: skip

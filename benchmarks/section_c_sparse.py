"""Section C: sparse Jacobians and Hessians (C1, C2, C3, C7, and the sparse halves of B15 and B17)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from scipy import sparse
from scipy.optimize._numdiff import group_columns

import chainrule
from benchmarks.peers import hessians, jacobians
from benchmarks.scientific import (
    Adjustment,
    brusselator,
    brusselator_state,
    hand_brusselator,
    hand_rosenbrock,
    rolled,
    rosenbrock,
    sliced,
)  # fmt: skip
from benchmarks.section_b_curvature import factorisation_loss
from benchmarks.section_b_networks import convolutions
from benchmarks.workload import Expression, Targets, Workload

tf = torch.func
Tensor = torch.Tensor


# --- what is compared -----------------------------------------------------------------------------------------------


def directions(out_size: int, in_size: int) -> tuple[Tensor, Tensor]:
    """A row and a column vector that are the same every time."""
    drawn = torch.Generator().manual_seed(1)
    return tuple(torch.randn(size, dtype=torch.float64, generator=drawn) for size in (out_size, in_size))  # type: ignore[return-value]


def products(found: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """A matrix, sparse or dense, times a fixed column, and a fixed row times it: what is compared where no peer is that large."""
    in_size = inputs[0].numel()
    if found.layout is torch.strided:
        matrix = found.reshape(-1, in_size)
        left, right = directions(len(matrix), in_size)
        return matrix @ right, left @ matrix
    pointers, columns, values = found.crow_indices(), found.col_indices(), found.values()
    left, right = directions(found.shape[0], in_size)
    rows = torch.arange(found.shape[0]).repeat_interleave(pointers.diff())
    column = values.new_zeros(found.shape[0]).index_add_(0, rows, values * right[columns])
    return column, values.new_zeros(in_size).index_add_(0, columns, values * left[rows])


def reference(function: Expression) -> Expression:
    """The same products by torch.func, of the function's Jacobian with respect to its first argument."""

    def of(x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        def first(x: Tensor) -> Tensor:
            return function(x, *others).reshape(-1)

        value, pull = tf.vjp(first, x)
        left, right = directions(value.numel(), x.numel())
        return tf.jvp(first, (x,), (right.view_as(x),))[1], pull(left)[0].reshape(-1)

    return of


def _by_products(_: str, found: Any, inputs: tuple[Tensor, ...]) -> Any:
    return products(found, inputs)


# --- torch.func with a colouring made beforehand --------------------------------------------------------------------


class Coloured:
    """A compressed Jacobian in torch.func: one tangent per colour at once, and its entries gathered.

    Args:
        function: the function.
        pattern: a CSR matrix with the pattern, for an input of ``pattern.shape[1]`` elements.
    """

    def __init__(self, function: Expression, pattern: Tensor) -> None:
        self.function = function
        self.pointers, self.columns = pattern.crow_indices(), pattern.col_indices()
        values = torch.ones(self.columns.numel(), dtype=torch.int8)
        self.shape = tuple(pattern.shape)
        structure = sparse.csr_matrix((values.numpy(), self.columns.numpy(), self.pointers.numpy()), shape=self.shape)
        self.groups = torch.from_numpy(group_columns(structure)).long()
        rows = torch.arange(self.shape[0]).repeat_interleave(self.pointers.diff())
        self.places = self.groups[self.columns] * self.shape[0] + rows
        self.seeds = torch.nn.functional.one_hot(self.groups).t().double().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """The Jacobian in CSR."""

        def push(seed: Tensor) -> Tensor:
            return tf.jvp(self.function, (x,), (seed.view_as(x),))[1].reshape(-1)

        values = tf.vmap(push)(self.seeds).reshape(-1)[self.places]
        return torch.sparse_csr_tensor(self.pointers, self.columns, values, self.shape, check_invariants=False)


def _coloured(function: Expression, pattern: Callable[[int], Tensor], size: Callable[[Tensor], int]) -> Expression:
    """The compressed Jacobian, coloured when it is first called for a size."""

    @lru_cache(maxsize=2)
    def made(n: int) -> Coloured:
        return Coloured(function, pattern(n))

    return lambda x: made(size(x))(x)


# --- the rows -------------------------------------------------------------------------------------------------------


def brusselator_row(
    key: str,
    size: int,
    laplacian: Callable[[Tensor], Tensor],
    *,
    dense: bool = False,
    sizes: Mapping[int, Workload] | None = None,
) -> Workload:
    """C1 and C2; beside the dense Jacobian where that is small enough."""
    rhs = brusselator(laplacian)
    return Workload(
        key=key,
        title=f"sparse Jacobian of the Brusselator, {size}×{size}, by {laplacian.__name__} values",
        inputs=lambda: (brusselator_state(size),),
        ours={"jacobian": chainrule.jacobian(rhs, layout="sparse_csr")},
        peers={"jacfwd": tf.jacfwd(rhs)} if dense else {},
        hand=hand_brusselator,
        targets=Targets(50 if dense else None, eager_function=10 if size == 512 else None),
        dtype=torch.float64,
        sizes=sizes or {},
        exponent=1.1 if sizes else None,
        function=rhs,
        coloured={"vmap(jvp)": _coloured(rhs, lambda n: hand_brusselator(brusselator_state(n)), lambda x: x.shape[-1])},
        reference=reference(rhs),
        reduced=_by_products,
        large=size > 200 or (dense and size > 32),
    )


def rosenbrock_row(
    key: str, size: int, *, dense: bool = False, sizes: Mapping[int, Workload] | None = None
) -> Workload:
    """C3; beside the dense Hessian where that is small enough."""
    return Workload(
        key=key,
        title=f"sparse Hessian of the Rosenbrock chain, n={size}",
        inputs=lambda: (torch.randn(size, dtype=torch.float64),),
        ours={"hessian": chainrule.hessian(rosenbrock, layout="sparse_csr")},
        peers={"hessian": tf.hessian(rosenbrock)} if dense else {},
        hand=hand_rosenbrock,
        targets=Targets(30 if size == 1000 else None),
        dtype=torch.float64,
        sizes=sizes or {},
        exponent=1.1 if sizes else None,
        function=rosenbrock,
        coloured={"vmap(jvp(grad))": _coloured(tf.grad(rosenbrock), lambda n: hand_rosenbrock(torch.zeros(n).double()), len)},
        reference=reference(tf.grad(rosenbrock)),
        reduced=_by_products,
        large=size > 20_000 or (dense and size > 2000),
    )


def adjustment_row(cameras: int, points: int, observations: int) -> Workload:
    """C7, beside the blocks gathered by hand."""
    problem = Adjustment(cameras, points, observations)

    def reduced(column: str, found: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        if column != "peer":
            return products(found, inputs)
        left, right = directions(3 * observations, inputs[0].numel())
        left = torch.cat([left[: 2 * observations].view(-1, 2), left[2 * observations :, None]], 1)
        column_product = torch.einsum("nij,nj->ni", found, problem.own(right))
        # The transpose of a gather is a scatter, which torch.func makes of it.
        scatter = tf.vjp(problem.own, inputs[0])[1]
        row_product = scatter(torch.einsum("ni,nij->nj", left, found))[0]
        return torch.cat([column_product[:, :2].reshape(-1), column_product[:, 2]]), row_product

    return Workload(
        key="C7",
        title=f"sparse Jacobian of bundle adjustment, {cameras} cameras, {points} points, {observations} observations",
        inputs=lambda: (problem.start(),),
        ours={"jacobian": chainrule.jacobian(problem.residuals, layout="sparse_csr")},
        peers={"vmap(jacfwd) of gathered parameters": problem.gathered},
        targets=Targets(eager_function=8),
        dtype=torch.float64,
        function=problem.residuals,
        reference=reference(problem.residuals),
        reduced=reduced,
    )


def factorisation_row(key: str, rows: int, rank: int, *, dense: bool) -> Workload:
    """B15, sparse."""

    def make() -> tuple[Tensor, ...]:
        mask = torch.bernoulli(torch.full((rows, rows), 0.1))
        return tuple(t.double() for t in (torch.randn(rows, rank), torch.randn(rows, rank), torch.randn(rows, rows), mask))

    return Workload(
        key=key,
        title=f"sparse Hessian wrt U of Σ Ω∘(T − U Vᵀ)², n=m={rows}, k={rank}, float64",
        inputs=make,
        ours={"hessian": chainrule.hessian(factorisation_loss, layout="sparse_csr")},
        peers=hessians(factorisation_loss, chunks=(32,)) if dense else {},  # whole they take gigabytes
        hand=hand_factorisation,
        targets=Targets(10 if dense else None, 2),
        dtype=torch.float64,
        section="C",
        function=factorisation_loss,
        reference=reference(tf.grad(factorisation_loss)),
        reduced=_by_products,
    )


@lru_cache(maxsize=4)
def _blocks(rows: int, rank: int) -> tuple[Tensor, Tensor]:
    columns = torch.arange(rows * rank).view(rows, 1, rank).expand(rows, rank, rank).reshape(-1)
    return torch.arange(0, rows * rank * rank + 1, rank), columns


def hand_factorisation(left: Tensor, right: Tensor, _: Tensor, mask: Tensor) -> Tensor:
    """2 Vᵀ diag(Ωᵢ) V for every row i of U, as the blocks of a CSR matrix."""
    rows, rank = left.shape
    pointers, columns = _blocks(rows, rank)
    outer = (right.unsqueeze(-1) * right.unsqueeze(-2)).reshape(-1, rank * rank)
    values = (2 * mask @ outer).reshape(-1)
    return torch.sparse_csr_tensor(pointers, columns, values, (rows * rank,) * 2, check_invariants=False)


def convolution_row(side: int, channels: int) -> Workload:
    """B17, sparse."""

    def make() -> tuple[Tensor, ...]:
        shape = (channels, channels, 3, 3)
        parts = [part for _ in range(2) for part in (torch.randn(shape) / math.sqrt(9 * channels), torch.randn(channels))]
        return tuple(t.double() for t in (torch.randn(1, channels, side, side), *parts))

    return Workload(
        key="B17csr",
        title=f"sparse Jacobian of conv · tanh · conv, {channels} channels, {side}×{side}",
        inputs=make,
        ours={"jacobian": chainrule.jacobian(convolutions, layout="sparse_csr")},
        peers=jacobians(convolutions, chunks=(256,)),
        targets=Targets(5),
        section="C",
        function=convolutions,
        reference=reference(convolutions),
        reduced=_by_products,
        large=side > 16,
    )


def _rosenbrock_growth() -> dict[int, Workload]:
    return {n: rosenbrock_row("C3", n, dense=n <= 4000) for n in (1000, 2000, 4000, 10_000, 100_000, 1_000_000)}


def _brusselator_growth() -> dict[int, Workload]:
    sides = (22, 32, 45, 71, 224, 707)
    return {2 * side * side: brusselator_row("C1", side, rolled, dense=side <= 45) for side in sides}


WORKLOADS: tuple[Workload, ...] = (
    brusselator_row("C1", 24, rolled, dense=True, sizes=_brusselator_growth()),
    *(brusselator_row(f"C1{letter}", side, rolled) for letter, side in zip("abcd", (32, 96, 192, 512), strict=True)),
    brusselator_row("C2", 24, sliced, dense=True),
    *(brusselator_row(f"C2{letter}", side, sliced) for letter, side in zip("abcd", (32, 96, 192, 512), strict=True)),
    rosenbrock_row("C3", 1000, dense=True, sizes=_rosenbrock_growth()),
    rosenbrock_row("C3a", 100_000),
    rosenbrock_row("C3b", 1_000_000),
    adjustment_row(49, 7776, 31843),
    factorisation_row("B15csr", 300, 5, dense=True),
    factorisation_row("B15csrl", 1000, 5, dense=False),
    convolution_row(32, 16),
)

#: The same rows at sizes that every test run can afford.
SMALL: tuple[Workload, ...] = (
    brusselator_row("C1", 5, rolled, dense=True),
    *(brusselator_row(f"C1{letter}", side, rolled) for letter, side in zip("abcd", (3, 4, 6, 7), strict=True)),
    brusselator_row("C2", 5, sliced, dense=True),
    *(brusselator_row(f"C2{letter}", side, sliced) for letter, side in zip("abcd", (3, 4, 6, 7), strict=True)),
    rosenbrock_row("C3", 20, dense=True),
    rosenbrock_row("C3a", 2),
    rosenbrock_row("C3b", 101),
    adjustment_row(3, 10, 25),
    factorisation_row("B15csr", 7, 2, dense=True),
    factorisation_row("B15csrl", 3, 1, dense=False),
    convolution_row(5, 3),
)

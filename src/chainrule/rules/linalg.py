"""Linear algebra: solutions, inverses and factorisations, batch dimensions kept diagonal.

Formulas as in M. B. Giles, "Collected matrix derivative results for forward and reverse mode algorithmic
differentiation" (2008). Eigenvalues, singular values, QR and LU stand in :mod:`chainrule.rules.linalg_factorisations`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from chainrule.maps.nodes import Node, leaf
from chainrule.maps.staging import Program, Staged
from chainrule.maps.terms import Axis, Dims, Factor, Term, constant_index, dims_of, new_axes
from chainrule.rules.base import Call, Edge, Rule, broadcast_axes, single
from chainrule.rules.families import operator_edge

aten = torch.ops.aten


def _flat(dims: Dims) -> tuple[Axis, ...]:
    return tuple(axis for dim in dims for axis in dim)


def _matrix_factor(
    stage: Callable[[Program], Staged], batch: Dims, rows: Axis, columns: Axis, label: str, flops: int = 0
) -> Factor:
    """A batch of matrices; batch dimensions of size one that were broadcast carry no axis."""
    axes = (*_flat(batch), rows, columns)
    sizes = tuple(axis.size for axis in axes)

    def sized(program: Program) -> Staged:
        value = stage(program)
        return value if tuple(value.shape) == sizes else torch.reshape(value, sizes)

    return Factor(leaf(sizes, sized, flops=flops, label=label), axes)


def _solution_edges(
    call: Call,
    left: bool,
    inverse: Callable[[Program], Staged],
    mask: Callable[[int], Node] | None,
) -> Iterable[Edge]:
    """The edges of ``A X = B`` (or ``X A = B``): ``dX = A^-1 (dB - dA X)`` (or ``(dB - X dA) A^-1``)."""
    matrix, right = call.args[0], call.args[1]
    shape, right_shape, out_shape = call.shape(matrix), call.shape(right), call.out_shape
    vector = len(right_shape) == 1 or (len(right_shape) == len(shape) - 1 and right_shape == shape[:-1])
    batch_axes = new_axes(out_shape[:-1] if vector else out_shape[:-2])
    size = shape[-1]
    i, j, k, free = Axis(size), Axis(size), Axis(size), Axis(1 if vector else out_shape[-1 if left else -2])
    batch = broadcast_axes(shape[:-2], batch_axes)
    flops = size**3

    def shaped(own: Axis, lead: Dims) -> Dims:
        if vector:
            return (*lead, (own,))
        return (*lead, (own,), (free,)) if left else (*lead, (free,), (own,))

    out_batch = dims_of(batch_axes)
    if call.is_active(right):
        inverted = _matrix_factor(inverse, batch, i if left else j, j if left else i, "inverse", flops)
        right_batch = broadcast_axes(right_shape[: len(right_shape) - (1 if vector else 2)], batch_axes)
        yield single(call, right, [Term(shaped(i, out_batch), shaped(j, right_batch), (inverted,))])
    if call.is_active(matrix):
        inverted = _matrix_factor(inverse, batch, i if left else j, j if left else i, "inverse", flops)
        solved = call.stage_output
        solution = _matrix_factor(solved, out_batch, *((k, free) if left else (free, k)), "solution")
        in_dims = (*batch, (j,), (k,)) if left else (*batch, (k,), (j,))
        factors = [inverted, solution]
        if mask is not None:
            factors.append(Factor(mask(size), (j, k) if left else (k, j)))
        yield single(call, matrix, [Term(shaped(i, out_batch), in_dims, tuple(factors), (), -1.0)])


def _solve(call: Call) -> Iterable[Edge]:
    def inverse(program: Program) -> Staged:
        return torch.linalg.inv_ex(call.stage(program, call.args[0]))[0]

    yield from _solution_edges(call, bool(call.argument("left")), inverse, None)


def _solve_triangular(call: Call) -> Iterable[Edge]:
    upper, unit = bool(call.argument("upper")), bool(call.argument("unitriangular"))
    dtype, device = call.tensor(call.args[0]).dtype, call.tensor(call.args[0]).device

    def inverse(program: Program) -> Staged:
        matrix = call.stage(program, call.args[0])
        eye = program.constant(torch.eye(matrix.shape[-1], dtype=dtype, device=device))
        eye = torch.broadcast_to(eye, matrix.shape)
        return aten.linalg_solve_triangular.default(matrix, eye, upper=upper, unitriangular=unit)

    def mask(size: int) -> Node:
        def make(where: torch.device) -> torch.Tensor:
            full = torch.ones((size, size), dtype=dtype, device=where)
            return full.triu(int(unit)) if upper else full.tril(-int(unit))

        return constant_index((size, size), make, device)

    yield from _solution_edges(call, bool(call.argument("left")), inverse, mask)


def _inverse(call: Call) -> Iterable[Edge]:
    """``dY = -Y dA Y``."""
    item = call.args[0]
    if not call.is_active(item):
        return
    shape = call.shape(item)
    batch = dims_of(new_axes(shape[:-2]))
    i, j, k, m = (Axis(shape[-1]) for _ in range(4))
    one = _matrix_factor(call.stage_output, batch, i, j, "inverse")
    two = Factor(one.node, (*_flat(batch), k, m))
    yield single(call, item, [Term((*batch, (i,), (m,)), (*batch, (j,), (k,)), (one, two), (), -1.0)])


def _log_determinant(call: Call) -> Iterable[Edge]:
    """``d log|det A| = tr(A^-1 dA)``; the sign is constant."""
    item = call.args[0]
    if not call.is_active(item):
        return
    shape = call.shape(item)
    batch = dims_of(new_axes(shape[:-2]))
    i, j = Axis(shape[-1]), Axis(shape[-1])

    def stage(program: Program) -> Staged:
        return torch.linalg.inv_ex(call.stage(program, item))[0]

    factor = _matrix_factor(stage, batch, j, i, "inverse", shape[-1] ** 3)
    yield single(call, item, [Term(batch, (*batch, (i,), (j,)), (factor,))], output=1)


def _cholesky(call: Call) -> Iterable[Edge]:
    """``dL = L phi(L^-1 dA L^-T)`` with ``dA`` symmetrised; ``phi`` keeps the lower triangle and halves the diagonal."""
    item, upper = call.args[0], bool(call.argument("upper"))
    if not call.is_active(item):
        return
    shape = call.shape(item)
    size = shape[-1]
    dtype, device = call.tensor(item).dtype, call.tensor(item).device

    def parts(program: Program) -> tuple[Staged, Staged, Staged]:
        lower = call.stage_output(program)
        lower = torch.transpose(lower, -2, -1) if upper else lower
        full = torch.ones((size, size), dtype=dtype, device=device).tril()
        return lower, torch.linalg.inv_ex(lower)[0], program.constant(full - 0.5 * torch.eye(size, dtype=dtype, device=device))

    def symmetric(rows: Staged) -> Staged:
        return (rows + torch.transpose(rows, -2, -1)) * 0.5

    def push(c: Call, program: Program, rows: Staged, count: int) -> Staged:
        lower, inverse, phi = parts(program)
        inner = torch.matmul(torch.matmul(inverse, symmetric(rows)), torch.transpose(inverse, -2, -1)) * phi
        pushed = torch.matmul(lower, inner)
        return torch.transpose(pushed, -2, -1) if upper else pushed

    def pull_one(program: Program, row: Staged) -> Staged:
        """Two triangular systems where nothing else wants the inverse; a triangle and its part below the diagonal are 2 phi."""
        lower = call.stage_output(program)
        lower = torch.transpose(lower, -2, -1) if upper else lower
        raised = torch.transpose(lower, -2, -1)
        inner = torch.matmul(raised, row)
        inner = torch.tril(inner) + torch.tril(inner, -1)
        inner = aten.linalg_solve_triangular.default(raised, inner, upper=True)
        inner = aten.linalg_solve_triangular.default(lower, inner, upper=False, left=False)
        return (inner + torch.transpose(inner, -2, -1)) * 0.25

    def pull(c: Call, program: Program, rows: Staged, count: int) -> Staged:
        rows = torch.transpose(rows, -2, -1) if upper else rows
        if count == 1 and not call.workspace.repeated and (call.workspace.kernels or call.workspace.mapped):
            return torch.unsqueeze(pull_one(program, torch.select(rows, 0, 0)), 0)
        lower, inverse, phi = parts(program)
        inner = torch.matmul(torch.transpose(lower, -2, -1), rows) * phi
        return symmetric(torch.matmul(torch.matmul(torch.transpose(inverse, -2, -1), inner), inverse))

    diagonal = tuple((d, d) for d in range(len(shape) - 2))
    yield operator_edge(call, item, push, pull, diagonal, 3 * size * call.tensor(item).numel())


RULES: dict[Any, Rule] = {
    aten._linalg_solve_ex.default: Rule("linear algebra", _solve),
    aten.linalg_solve_triangular.default: Rule("linear algebra", _solve_triangular),
    aten.linalg_inv_ex.default: Rule("linear algebra", _inverse),
    aten._linalg_slogdet.default: Rule("linear algebra", _log_determinant),
    aten.linalg_cholesky_ex.default: Rule("linear algebra", _cholesky),
    **({aten.cholesky.default: Rule("linear algebra", _cholesky)} if hasattr(aten, "cholesky") else {}),  # up to torch 2.13
}

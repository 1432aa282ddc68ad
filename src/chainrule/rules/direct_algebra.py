"""Products, distances and grids that torch composes of other ops, as in :mod:`chainrule.rules.direct`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from chainrule.shapes import broadcast_shapes

aten = torch.ops.aten
Tensor = torch.Tensor
Run = Callable[..., Any]


def _cross(run: Run, one: Tensor, two: Tensor, *, dim: int = -1) -> Any:
    """The cross product along a dimension of size 3."""
    if one.shape != two.shape or one.dtype is not two.dtype or not one.dim() or one.shape[dim] != 3:
        return NotImplemented
    ahead = run(aten.mul.Tensor, run(aten.roll.default, one, [-1], [dim]), run(aten.roll.default, two, [-2], [dim]))
    behind = run(aten.mul.Tensor, run(aten.roll.default, one, [-2], [dim]), run(aten.roll.default, two, [-1], [dim]))
    return run(aten.sub.Tensor, ahead, behind)


def _cdist(run: Run, one: Tensor, two: Tensor, p: float = 2.0, mode: int | None = None) -> Any:
    """Distances, whose derivative at zero is zero in every order."""
    if p != 2 or one.dim() < 2 or two.dim() < 2 or one.dtype is not two.dtype or one.shape[-1] != two.shape[-1]:
        return NotImplemented
    difference = run(aten.sub.Tensor, run(aten.unsqueeze.default, one, -2), run(aten.unsqueeze.default, two, -3))
    power = run(aten.sum.dim_IntList, run(aten.mul.Tensor, difference, difference), [-1])
    together = run(aten.eq.Scalar, power, 0)
    root = run(aten.sqrt.default, run(aten.masked_fill.Scalar, power, together, 1.0))
    return run(aten.masked_fill.Scalar, root, together, 0.0)


def _kron(run: Run, one: Tensor, two: Tensor) -> Any:
    if one.dtype is not two.dtype:
        return NotImplemented
    rank = max(one.dim(), two.dim())
    first = [1] * (rank - one.dim()) + [*one.shape]
    second = [1] * (rank - two.dim()) + [*two.shape]
    left = run(aten.view.default, one, [size for item in first for size in (item, 1)])
    right = run(aten.view.default, two, [size for item in second for size in (1, item)])
    product = run(aten.mul.Tensor, left, right)
    return run(aten._unsafe_view.default, product, [a * b for a, b in zip(first, second, strict=True)])


def _meshgrid(run: Run, tensors: Sequence[Tensor]) -> Any:
    if any(item.dim() > 1 or item.dtype is not tensors[0].dtype for item in tensors):
        return NotImplemented
    sizes = [item.numel() for item in tensors]
    grids = []
    for place, item in enumerate(tensors):
        shape = [1] * len(tensors)
        shape[place] = sizes[place]
        grids.append(run(aten.expand.default, run(aten.view.default, item, shape), sizes))
    return tuple(grids)


def _broadcast(run: Run, tensors: Sequence[Tensor]) -> Any:
    shapes = [item.shape for item in tensors]
    if all(shape == shapes[0] for shape in shapes):
        return tuple(tensors)
    try:
        sizes = [*broadcast_shapes(*shapes)]
    except RuntimeError:  # torch says what does not fit
        return NotImplemented
    return tuple([run(aten.expand.default, item, sizes) for item in tensors])


def _diag(run: Run, item: Tensor, offset: int = 0) -> Any:
    if item.dim() not in (1, 2):
        return NotImplemented
    return run(aten.diag_embed.default if item.dim() == 1 else aten.diagonal_copy.default, item, offset)


def _det(run: Run, matrix: Tensor) -> Any:
    return run(aten._linalg_det.default, matrix)[0]


def _inverse(run: Run, matrix: Tensor) -> Any:
    inverse, info = run(aten.linalg_inv_ex.default, matrix)
    run(aten._linalg_check_errors.default, info, "linalg.inv", is_matrix=matrix.dim() == 2)
    return inverse


def _cholesky(run: Run, matrix: Tensor, *, upper: bool = False) -> Any:
    if upper:
        return NotImplemented
    factor, info = run(aten.linalg_cholesky_ex.default, matrix)
    run(aten._linalg_check_errors.default, info, "linalg.cholesky", is_matrix=matrix.dim() == 2)
    return factor


def _solve(run: Run, matrix: Tensor, right: Tensor, *, left: bool = True) -> Any:
    if not left:
        return NotImplemented
    solution, _, _, info = run(aten._linalg_solve_ex.default, matrix, right)
    run(aten._linalg_check_errors.default, info, "torch.linalg.solve", is_matrix=matrix.dim() == 2)
    return solution


#: By the op that arrives.
DIRECT_ALGEBRA: dict[Any, Callable[..., Any]] = {
    aten.linalg_cross.default: _cross,
    aten.cdist.default: _cdist,
    aten.kron.default: _kron,
    aten.meshgrid.default: _meshgrid,
    aten.broadcast_tensors.default: _broadcast,
    aten.diag.default: _diag,
    aten.linalg_det.default: _det,
    aten.linalg_inv.default: _inverse,
    aten.linalg_cholesky.default: _cholesky,
    aten.linalg_solve.default: _solve,
}

__all__ = ["DIRECT_ALGEBRA"]

"""Batching of linear algebra: the ops take leading batch dimensions already; only ranks must be aligned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chainrule.rules.batching_base import (
    Batched,
    BatchStrategy,
    bind,
    is_batched,
    logical_rank,
    logical_shape,
    mark,
    physical,
)
from chainrule.rules.batching_shift import shift_dims, trailing

aten = torch.ops.aten


def check_errors(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> None:
    """_linalg_check_errors: the failing samples are named by their index."""
    kwargs = {**kwargs, "is_matrix": False}
    func(args[0].value, *args[1:2], **kwargs)


def _padded(x: Any, rank: int, size: int) -> Tensor:
    value: Tensor = physical(x, size)
    while value.dim() - 1 < rank:
        value = value.unsqueeze(1)
    return value


def aligned_matrices(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """Ops on two or more (stacks of) matrices whose leading dimensions broadcast."""
    tensors = [x for x in args if is_batched(x) or isinstance(x, Tensor)]
    rank = max(logical_rank(x) for x in tensors)
    values = [_padded(x, rank, size) if is_batched(x) or isinstance(x, Tensor) else x for x in args]
    return mark(func(*values, **kwargs))


def _unpad(value: Tensor, shape: Sequence[int], size: int) -> Batched:
    return Batched(value.reshape([size, *shape]))


def solve(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """_linalg_solve_ex: a right side of one rank less that fits is a (stack of) vectors."""
    matrix, right = args
    shape, right_shape = logical_shape(matrix), logical_shape(right)
    vector = len(right_shape) == 1 or (len(shape) - 1 == len(right_shape) and right_shape == shape[:-1])
    a, b = physical(matrix, size), physical(right, size)
    if vector:
        b = b.unsqueeze(-1)
    rank = max(a.dim(), b.dim()) - 1
    result, factors, pivots, info = func(_padded(Batched(a), rank, size), _padded(Batched(b), rank, size), **kwargs)
    if vector:
        result = result.squeeze(-1)
    return (
        Batched(result),
        _unpad(factors, shape, size),
        _unpad(pivots, shape[:-1], size),
        _unpad(info, shape[:-2], size),
    )


def lstsq(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """linalg_lstsq: the same rule for vectors as solve."""
    bound = bind(func, args, kwargs)
    matrix, right = bound.pop("self"), bound.pop("b")
    if logical_rank(matrix) != logical_rank(right):
        right_value = physical(right, size).unsqueeze(-1)
        solution, *others = func(physical(matrix, size), right_value, **bound)
        solution = solution.squeeze(-1)
    else:
        solution, *others = func(physical(matrix, size), physical(right, size), **bound)
    # What was not computed is empty, with or without a batch: the same for all samples.
    return (Batched(solution), *[item if item.shape == (0,) else Batched(item) for item in others])


def batch_all(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """Every tensor gets the batch in front; the op takes leading dimensions of equal length."""
    values = [physical(x, size) for x in args]
    return mark(func(*values, **{key: physical(x, size) for key, x in kwargs.items()}))


def pinv(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """linalg_pinv with tensor tolerances: they broadcast against the leading dimensions."""
    matrix = physical(args[0], size)
    leading = matrix.dim() - 3

    def tolerance(x: Any) -> Any:
        return _padded(x, leading, size) if is_batched(x) or isinstance(x, Tensor) else x

    return Batched(func(matrix, *args[1:], **{key: tolerance(x) for key, x in kwargs.items()}))


def ldl_solve(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """linalg_ldl_solve(LD, pivots, B): leading dimensions broadcast; pivots have one rank less."""
    rank = max(logical_rank(args[0]), logical_rank(args[2]))
    factors, right = _padded(args[0], rank, size), _padded(args[2], rank, size)
    return Batched(func(factors, _padded(args[1], rank - 1, size), right, **kwargs))


def trace(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """trace: the sum of the diagonal."""
    value = args[0].value
    if value.dim() != 3:
        raise RuntimeError(f"trace: expected a matrix, but got tensor with dim {value.dim() - 1}")
    return Batched(value.diagonal(0, 1, 2).sum(1))


def trace_backward(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Batched:
    """trace_backward."""
    grad, sizes = args
    result = grad.value.new_zeros([size, *sizes])
    result.diagonal(0, 1, 2).copy_(grad.value.unsqueeze(1).expand(size, min(sizes)))
    return Batched(result)


def cdist_backward(func: Any, args: Sequence[Any], kwargs: dict[str, Any], size: int) -> Any:
    """_cdist_backward; its kernel wants equal ranks even where nothing is to be computed."""
    if any((is_batched(x) or isinstance(x, Tensor)) and 0 in logical_shape(x) for x in args):
        return NotImplemented
    return batch_all(func, args, kwargs, size)


_ONE_MATRIX = [
    aten._linalg_det.default,
    aten._linalg_eigh.default,
    aten._linalg_eigvals.default,
    aten._linalg_slogdet.default,
    aten._linalg_svd.default,
    *([aten.cholesky.default] if hasattr(aten, "cholesky") else []),  # up to torch 2.13
    aten.cholesky_inverse.default,
    aten.geqrf.default,
    aten.linalg_cholesky_ex.default,
    aten.linalg_eig.default,
    aten.linalg_inv_ex.default,
    aten.linalg_ldl_factor_ex.default,
    aten.linalg_lu.default,
    aten.linalg_lu_factor_ex.default,
    aten.linalg_matrix_exp.default,
    aten.linalg_qr.default,
]
_SEVERAL_MATRICES = [
    aten._cdist_forward.default,
    aten._cholesky_solve_helper.default,
    aten.cholesky_solve.default,
    aten.linalg_solve_triangular.default,
    aten.triangular_solve.default,
]
_LEADING_EQUAL = [
    aten.lu_unpack.default,
    aten.linalg_householder_product.default,
    aten.linalg_lu_solve.default,
    aten.ormqr.default,
]

LINALG: dict[Any, BatchStrategy] = {
    **dict.fromkeys(_ONE_MATRIX, trailing),
    **dict.fromkeys(_SEVERAL_MATRICES, aligned_matrices),
    **dict.fromkeys(_LEADING_EQUAL, batch_all),
    aten._linalg_solve_ex.default: solve,
    aten.linalg_lstsq.default: lstsq,
    aten.linalg_ldl_solve.default: ldl_solve,
    aten.linalg_pinv.atol_rtol_tensor: pinv,
    aten._linalg_check_errors.default: check_errors,
    aten._cdist_backward.default: cdist_backward,
    aten.linalg_cross.default: shift_dims,
    aten.trace.default: trace,
}
if hasattr(aten, "trace_backward"):
    LINALG[aten.trace_backward.default] = trace_backward

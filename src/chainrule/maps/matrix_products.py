"""Which kernel computes a product of two matrices, or of two stacks of them, fastest."""

from __future__ import annotations

import math
from typing import Any

import torch

from chainrule.maps.staging import Staged

#: Matrices of at most this many rows and columns are small,
_SMALL_MATRIX = 8
#: and many where their products take this many multiply-adds.
_MANY = 1 << 17


def many_small(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether ``x @ y`` is of many small matrices that do not stand in memory one by one: a stack runs fastest.

    A product per matrix would copy them first, entry by entry, and is itself ten times slower than passes over the stacks.
    """
    m, k, n = x.shape[-2], x.shape[-1], y.shape[-1]
    stack = math.prod(x.shape[:-2])
    if max(m, k, n) > _SMALL_MATRIX or not stack * m * k * n >= _MANY:
        return False
    return _runs_along_stack(x) and _runs_along_stack(y)


def _runs_along_stack(matrices: torch.Tensor) -> bool:
    strides = [s if size > 1 and s else math.inf for s, size in zip(matrices.stride(), matrices.shape, strict=True)]
    return min(strides[:-2]) < min(strides[-2:])


def products_by_columns(x: Any, y: Any) -> Any:
    """``x @ y`` for stacks of matrices, as a sum of outer products of columns of ``x`` and rows of ``y``."""
    pairs = [(x.narrow(-1, number, 1), y.narrow(-2, number, 1)) for number in range(x.shape[-1])]
    total = torch.mul(*pairs[0])
    for column, row in pairs[1:]:
        total = torch.addcmul(total, column, row)
    return total


#: A matrix product with fewer columns than this, and more rows, is computed as its transpose.
_FEW_COLUMNS = 65
#: For fewer multiply-adds than this the views cost what the kernel saves.
_WORTH_TURNING = 1 << 16


def plain_product(x: Staged, y: Staged) -> Staged:
    """The product of two matrices, of a matrix and a vector, or of two vectors."""
    if x.ndim == 2 and y.ndim == 2:
        rows, columns = x.shape[0], y.shape[1]
        if columns < _FEW_COLUMNS and 2 * columns <= rows and rows * columns * x.shape[1] >= _WORTH_TURNING:
            # The kernels want the long dimension last in memory: by a third to many times faster, never much slower.
            return torch.t(torch.mm(torch.t(y), torch.t(x)))
        return torch.mm(x, y)
    if x.ndim == 2:
        return torch.mv(x, y)
    if y.ndim == 2:
        return torch.mv(torch.t(y), x)
    return torch.dot(x, y)

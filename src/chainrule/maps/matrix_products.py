"""Which kernels compute a product with summed dimensions fastest: as one of matrices, or of two stacks of them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from chainrule.maps.staging import Staged
from chainrule.maps.views import expand_to, permute

#: Of so few matrix-vector products, along which a stack runs in memory for so long, multiplying and summing takes less time.
_FEW_DOTS = 16
_LONG_RUN = 16

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


def _plain_product(x: Staged, y: Staged) -> Staged:
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


def matrix_product(
    x: Staged,
    left: tuple[int, ...],
    y: Staged,
    right: tuple[int, ...],
    groups: tuple[tuple[int, ...], ...],
    sizes: dict[int, int],
) -> Staged:
    """Lower a contraction with summed axes to dot, mv, mm or bmm, with the fewest reshapes."""
    batch, left_only, right_only, gone = groups
    if not batch and len(gone) == len(left) == len(right):
        if len(gone) == 1:
            return torch.dot(x, y)
        if left == right:
            return torch.sum(torch.mul(x, y))
    if batch and _is_thin(x, left, y, right, groups, sizes):
        # Matrix products of single rows are slower than multiplying and summing.
        order = batch + left_only + right_only
        if not left_only and not right_only:
            product = torch.mul(expand_to(x, left, order + gone), expand_to(y, right, order + gone))
            return torch.sum(product, tuple(range(len(order), len(order) + len(gone))))
        if len(left) < len(right):
            x, left, y, right = y, right, x, left
        total = torch.sum(torch.mul(x, expand_to(y, right, left)), tuple(left.index(name) for name in gone))
        kept = [name for name in left if name not in gone]
        return permute(total, tuple(kept.index(name) for name in order))
    b, m, n, k = (math.prod(sizes[name] for name in group) for group in groups)
    if batch and len(gone) == 1 and len(left_only) < 2 and len(right_only) < 2:
        rows, columns = batch + left_only + gone, batch + gone + right_only
        one, two = expand_to(x, left, rows), expand_to(y, right, columns)
        one = one if left_only else torch.unsqueeze(one, -2)
        two = two if right_only else torch.unsqueeze(two, -1)
        if many_small(one.value, two.value):
            return _view(products_by_columns(one, two), [sizes[name] for name in batch + left_only + right_only])
    x_shape = ([b] if batch else []) + ([m] if left_only else []) + [k]
    y_shape = ([b] if batch else []) + [k] + ([n] if right_only else [])
    if batch and not left_only:
        x_shape.insert(1, 1)
    if batch and not right_only:
        y_shape.append(1)
    x = _matrix(x, left, (batch, left_only, gone), x_shape)
    y = _matrix(y, right, (batch, gone, right_only), y_shape)
    result = torch.bmm(x, y) if batch else _plain_product(x, y)
    return _view(result, [sizes[name] for name in batch + left_only + right_only])


def _is_thin(
    x: Staged, left: tuple[int, ...], y: Staged, right: tuple[int, ...],
    groups: tuple[tuple[int, ...], ...], sizes: dict[int, int],
) -> bool:  # fmt: skip
    """Whether the products of a stack are one dot product each, or a few of operands that stand in memory along the stack."""
    batch, left_only, right_only, _ = groups
    if not left_only and not right_only:
        return True
    if left_only and right_only or math.prod(sizes[name] for name in left_only + right_only) > _FEW_DOTS:
        return False
    last = next((name for name in reversed(batch) if sizes[name] != 1), None)
    if last is None or sizes[last] < _LONG_RUN:
        return False
    return all(value.value.stride(names.index(last)) == 1 for value, names in ((x, left), (y, right)))


def _matrix(
    value: Staged, names: tuple[int, ...], groups: tuple[tuple[int, ...], ...], shape: list[int]
) -> Staged:
    """View a value as a matrix (or a stack of them), with ``groups`` of its dimensions as stack, rows and columns.

    Where that takes a copy, the transpose is copied instead if torch walks through memory better so.
    """
    batch, rows, columns = groups
    order, flipped = batch + rows + columns, batch + columns + rows
    if rows and columns and _copying(value, names, (batch, columns, rows)) < _copying(value, names, groups):
        turned = permute(value, tuple(names.index(name) for name in flipped))
        return torch.transpose(_view(turned, [*shape[:-2], shape[-1], shape[-2]]), -1, -2)
    return _view(permute(value, tuple(names.index(name) for name in order)), shape)


def _copying(value: Staged, names: tuple[int, ...], groups: tuple[tuple[int, ...], ...]) -> float:
    """What it costs to lay a value out with these groups of dimensions merged: 0 for a view; short runs cost more."""
    strides = dict(zip(names, value.value.stride(), strict=True))
    sizes = dict(zip(names, value.shape, strict=True))
    merged = True
    for group in groups:
        axes = [name for name in group if sizes[name] != 1]
        merged = merged and all(strides[a] == strides[b] * sizes[b] for a, b in itertools.pairwise(axes))
    if merged:
        return 0.0
    run = 1
    for name in reversed([name for group in groups for name in group]):
        if sizes[name] != 1 and strides[name] != run:
            break
        run *= sizes[name]
    return value.numel() * (1 + 8 / max(run, 1))


def _view(value: Staged, shape: list[int]) -> Staged:
    return value if list(value.shape) == shape else torch.reshape(value, shape)


__all__ = ["many_small", "matrix_product", "products_by_columns"]

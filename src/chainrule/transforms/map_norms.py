"""Norms of linear maps, also where the squares of their entries are out of the range of their dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from chainrule.execute.prediction import peak_elements
from chainrule.execute.sparse import entries_predicted, execute_sparse
from chainrule.plan.sparse import SparseExpression
from chainrule.transforms.map_blocks import column_blocks, needs_blocks, squares_by_blocks
from chainrule.transforms.map_entries import is_linear, prefers_entries, squares_of_entries

if TYPE_CHECKING:
    from chainrule.transforms.linear_map import LinearMap

_dispatch_modes, _functorch = torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active

#: Sums of squares that are smaller may have lost digits.
_SMALLEST = {
    dtype: torch.finfo(dtype).tiny / torch.finfo(dtype).eps
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}

#: More entries than this are not made for a second look: of sums that overflow, and of those that are too small or not a number.
_MOST, _MOST_SMALL = 1 << 28, 1 << 20

#: Entries are listed for a second look where at most one in so many is one.
_PART = 4


def frobenius_norm(linear_map: LinearMap) -> torch.Tensor:
    """The Frobenius norm, of shape ``()``.

    It is the root of the sum of the squares, as these are contracted. Where that overflows or is too small to be exact, the
    entries are looked at and scaled by the largest of them. (As in LAPACK's ``lassq``: Anderson, *Algorithm 978: safe scaling
    in the level 1 BLAS*, 2017.) That is not done inside of transforms and records, which cannot ask for a value.
    """
    squares = _squares(linear_map)
    if not _may_be_read(squares) or _is_in_range(value := squares.detach().item(), squares.dtype):
        return _root(squares)
    parts = _parts(linear_map, _MOST if value == math.inf else _MOST_SMALL)
    return _root(squares) if parts is None else _scaled_norm(parts, squares)


def _squares(linear_map: LinearMap) -> torch.Tensor:
    is_large = needs_blocks(linear_map, "squares")
    # A sum of terms may keep its structure as long as its rows, or its columns, stay apart.
    if is_large and (product := next(filter(_has_diagonal, (linear_map.gram(), linear_map.normal())), None)) is not None:
        found = [part.sum() for part in product.read("diagonal").values()]
        return linear_map._scalar(sum(found[1:], found[0]) if found else None)
    if prefers_entries(linear_map, "squares"):
        return linear_map._scalar(squares_of_entries(linear_map))
    if is_large:
        return squares_by_blocks(linear_map)
    return linear_map._scalar(linear_map.read("squares").get("squares"))


def _has_diagonal(product: LinearMap) -> bool:
    """Whether the contraction to the diagonal holds a few numbers for each row and column."""
    return is_linear(peak_elements(*product._request("diagonal")), *product.shape)


def _root(squares: torch.Tensor) -> torch.Tensor:
    """The square root; its derivative at zero is zero, as that of torch's norms."""
    nothing = squares == 0
    return torch.where(nothing, 1.0, squares).sqrt().masked_fill(nothing, 0.0)


def _may_be_read(squares: torch.Tensor) -> bool:
    """Whether nothing is around that must not see a value being read."""
    if _dispatch_modes() or _functorch() or squares.dtype not in _SMALLEST:
        return False
    return squares.__class__ is torch.Tensor and not (squares.is_cuda and torch.cuda.is_current_stream_capturing())


def _is_in_range(squares: float, dtype: torch.dtype) -> bool:
    """Whether a sum of squares has neither overflowed nor lost digits below the smallest normal number."""
    return _SMALLEST[dtype] <= squares < math.inf


def _parts(linear_map: LinearMap, most: int) -> Iterable[torch.Tensor] | None:
    """Arrays that hold the entries of a map; None where these are more than ``most``."""
    total = linear_map.shape[0] * linear_map.shape[1]
    tape, request, seeds = linear_map._request("squares")
    expression = SparseExpression(request.expression)
    limit = min(total // _PART, most)
    count = entries_predicted(tape, expression, seeds, limit)
    if count is not None and count <= limit:
        return [values for values, _ in execute_sparse(tape, expression, seeds).values()]
    return column_blocks(linear_map) if total <= most else None


def _scaled_norm(parts: Iterable[torch.Tensor], beside: torch.Tensor) -> torch.Tensor:
    scale, total = torch.zeros_like(beside), torch.zeros_like(beside)
    for part in parts:
        if not part.numel():
            continue
        largest = torch.maximum(scale, part.detach().abs().max().to(beside))
        # Zeros so far, or an infinite entry: nothing is scaled.
        divisor = torch.where((largest > 0) & (largest < math.inf), largest, 1.0)
        total = total * (scale / divisor).square() + (part / divisor).square().sum()
        scale = largest
    return scale * _root(total)


__all__ = ["frobenius_norm"]

"""Matrix products that compute less than all of their result, because parts of it equal each other, or somewhat more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

#: Blocks of a symmetric result: with more, single products get too thin to be fast.
_BLOCKS = 3

#: The least size of a symmetric result that is computed by blocks.
LEAST_SYMMETRIC = 288


@dataclass(frozen=True, eq=False)
class DistinctRows:
    """A matrix product, of whose rows some equal others.

    Attributes:
        chosen: the rows that are computed.
        places: which of them each row of the result is.
    """

    chosen: torch.Tensor
    places: torch.Tensor
    __name__ = "distinct_rows"

    def __call__(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The product."""
        return torch.mm(left.index_select(0, self.chosen), right).index_select(0, self.places)

    def held(self, left: int, out: int) -> int:
        """The bytes that a call holds beside its result, of those of its left factor and of its result."""
        share = self.chosen.numel() / self.places.numel()
        return int((left + out) * share)


@dataclass(frozen=True, eq=False)
class FilledRows:
    """A matrix product, its rows put before rows of zeros.

    Attributes:
        rows: the rows of the product.
        whole: the same, up to the end of a block.
        function: what computes the rows, element by element; None where they are given.
        options: its keyword arguments.
        layout: shape and strides of its result within the rows.
    """

    rows: int
    whole: int
    function: Callable[..., Any] | None
    options: dict[str, Any]
    layout: tuple[tuple[int, ...], tuple[int, ...]]
    __name__ = "filled_rows"

    def __call__(self, matrix: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
        """The product of the rows with the matrix."""
        buffer = matrix.new_empty((self.whole, matrix.shape[0]))
        place = buffer.as_strided(*self.layout)
        if self.function is None:
            place.copy_(operands[0])
        else:
            self.function(*operands, **self.options, out=place)
        buffer[self.rows :] = 0.0
        return torch.mm(buffer, matrix)[: self.rows]

    def held(self, matrix: int, out: int) -> int:
        """The bytes that a call holds beside its result, of those of the matrix and of the result."""
        return self.whole * (matrix * self.rows + out * out) // (out * self.rows) if out else 0


def symmetric_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A matrix product whose result is symmetric: blocks of columns from the diagonal downwards, the rest by its mirror image."""
    size = left.shape[0]
    out = left.new_empty(size, size)
    width = -(-size // _BLOCKS)
    for start in range(0, size, width):
        end = min(start + width, size)
        torch.mm(left[start:], right[:, start:end], out=out[start:, start:end])
        if end < size:
            out[start:end, end:] = out[end:, start:end].t()
    return out


__all__ = ["LEAST_SYMMETRIC", "DistinctRows", "FilledRows", "symmetric_product"]

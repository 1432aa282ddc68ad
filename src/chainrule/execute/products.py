"""Matrix products that compute less than all of their result, because parts of it equal each other."""

from __future__ import annotations

from dataclasses import dataclass

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


__all__ = ["LEAST_SYMMETRIC", "DistinctRows", "symmetric_product"]

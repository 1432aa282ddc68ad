"""Several rows of cotangents or tangents through code that is written for one: at once, on mapped tensors, where that works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

#: What runs an action on one row on all of the rows at once, each result with them in its first dimension.
Mapper = Callable[[Callable[[torch.Tensor], Any], torch.Tensor], Any]


class RowMapping:
    """The mapper, which stands above the rules.

    Attributes:
        mapper: set by :mod:`chainrule.batching`.
    """

    mapper: Mapper | None = None


class Rows:
    """How one action takes several rows: mapped, or one after the other from the first time on that it cannot be mapped.

    Code that reads values (a branch, ``item``, NumPy), draws random numbers or writes to tensors from outside refuses mapped
    tensors with an error. It is then run row by row, and raises there what is an error of its own.

    Attributes:
        is_mappable: whether no attempt has failed so far.
    """

    def __init__(self) -> None:
        self.is_mappable = True

    def through(self, action: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The results of an action on each of the rows, stacked in front.

        Args:
            action: takes one row.
            rows: the rows, stacked in front.
            shape: the shape of one result, for no rows at all.
        """
        mapper = RowMapping.mapper
        if mapper is not None and rows.shape[0] > 1 and self.is_mappable:
            try:
                found: torch.Tensor = mapper(action, rows)
                return found
            except Exception:
                self.is_mappable = False
        results = [action(row) for row in rows.unbind(0)]
        return torch.stack(results) if results else rows.new_zeros((0, *shape))


__all__ = ["RowMapping", "Rows"]

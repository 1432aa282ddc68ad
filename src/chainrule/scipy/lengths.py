"""How many values a vector function has: the same at all points of one solve."""

from __future__ import annotations

import numpy as np


class Length:
    """The number of a function's values, which the first point of a solve tells.

    Args:
        where: the solver and the function, as messages begin.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._known: int | None = None

    def forget(self) -> None:
        """Begin another solve."""
        self._known = None

    def checked(self, values: np.ndarray) -> np.ndarray:
        """The values of a point.

        Raises:
            ValueError: if there are more or less of them than at the points before.
        """
        if self._known is None:
            self._known = values.size
        elif values.size != self._known:
            raise ValueError(f"{self._where} must return shape {(self._known,)}, as at the first point, got {values.shape}")
        return values


__all__ = ["Length"]

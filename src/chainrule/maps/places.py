"""Where values are other than zero, as far as that is known before the run."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Places:
    """Where a value may be other than zero.

    Args:
        make: makes the truth values on a device.
        reads: the slots of the constants whose values they follow from.

    Attributes:
        reads: as given.
    """

    def __init__(self, make: Callable[[torch.device], torch.Tensor], reads: frozenset[int]) -> None:
        self._make, self.reads = make, reads
        self._made: torch.Tensor | None = None

    def __call__(self, device: torch.device) -> torch.Tensor:
        """The truth values, made once."""
        if self._made is None:
            self._made = self._make(device)
        return self._made


__all__ = ["Places"]

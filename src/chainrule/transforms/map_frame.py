"""What the expression of a linear map refers to: several recorded runs, and tensors that are no part of them."""

from __future__ import annotations

from typing import Any

import torch

from chainrule.capture.joined import JoinedTape
from chainrule.capture.tape import Tape


class Frame:
    """The tapes and the seeds that an expression refers to, in the order of its numbers."""

    def __init__(self) -> None:
        self._tapes: list[Tape] = []
        self._offsets: list[int] = []
        self.seeds: list[torch.Tensor] = []

    def place(self, tape: Tape) -> int:
        """Where the slots of a tape begin."""
        for known, offset in zip(self._tapes, self._offsets, strict=True):
            if known is tape:
                return offset
        offset = self._offsets[-1] + len(self._tapes[-1].values) if self._tapes else 0
        self._tapes.append(tape)
        self._offsets.append(offset)
        return offset

    def seed(self, tensor: torch.Tensor) -> int:
        """The number of a seed."""
        self.seeds.append(tensor)
        return len(self.seeds) - 1

    @property
    def tape(self) -> Any:
        """The only tape, or all of them as one."""
        return self._tapes[0] if len(self._tapes) == 1 else JoinedTape(self._tapes)


__all__ = ["Frame"]
